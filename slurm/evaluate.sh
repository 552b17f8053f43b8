#!/usr/bin/env bash
# Evaluate a checkpoint with Slurm: one task per node, one rank per GPU (or $RANKS_PER_NODE of them).
#
#   sbatch --nodes 1 --gpus-per-node 8 slurm/evaluate.sh --checkpoint RUN [--tensor 2] --tasks hellaswag --data DIR ...
#
# Takes the arguments of tools/evaluate_model.py, and --hf DIR as well as --checkpoint RUN. Submit it in megalm's folder.
# On nodes without GPUs each node is one rank: add --device cpu. Partition, account and time limit go on sbatch's command
# line too. The table comes at the end of slurm-megalm-evaluate-JOB.log; a failure's reason is the line with `error:`.
#SBATCH --job-name=megalm-evaluate
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail
usage="usage: sbatch [options] slurm/evaluate.sh --checkpoint RUN --tasks TASK ... [--data DIR] [--tensor N]"
: "${1:?$usage}"
if [ ! -f tools/evaluate_model.py ]; then
  echo "error: $PWD is not megalm's folder: submit slurm/evaluate.sh there, with sbatch or sbatch --chdir" >&2
  exit 2
fi

export MASTER_ADDR MASTER_PORT PYTHONPATH
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID" \
  tools/evaluate_model.py "$@"
