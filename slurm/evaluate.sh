#!/usr/bin/env bash
# Evaluate a checkpoint with Slurm: one agent per node, one rank per GPU (or $RANKS_PER_NODE of them).
#
#   sbatch --nodes 1 --gpus-per-node 8 slurm/evaluate.sh --checkpoint RUN [--tensor 2] --tasks hellaswag --data DIR ...
#
# Takes the arguments of tools/evaluate_model.py, and --hf DIR as well as --checkpoint RUN. Submit it in megalm's folder.
# On nodes without GPUs each node is one rank: add --device cpu. Partition, account and time limit go on sbatch's command
# line too, or into a site profile (docs/launch.md). The table comes at the end of slurm-megalm-evaluate-JOB.log.
#SBATCH --job-name=megalm-evaluate
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
exec "${PYTHON:-python}" -m launch job tools/evaluate_model.py "$@"
