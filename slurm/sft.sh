#!/usr/bin/env bash
# Fine-tune with Slurm: one agent per node, one rank per GPU (or $RANKS_PER_NODE of them).
#
#   sbatch --nodes 4 --gpus-per-node 8 slurm/sft.sh CONFIG [--set key=value ...]
#
# Partition, account and time go on sbatch's command line too, or into a site profile (docs/launch.md). Before its time
# limit and when it is preempted the job saves and requeues itself, until the run is done.
#SBATCH --job-name=megalm-sft
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
exec "${PYTHON:-python}" -m launch job megalm/train.py --config "$@"
