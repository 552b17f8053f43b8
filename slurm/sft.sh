#!/usr/bin/env bash
# Fine-tune with Slurm: one task per node, one rank per GPU (or $RANKS_PER_NODE of them).
#
#   sbatch --nodes 1 --gpus-per-node 8 slurm/sft.sh configs/run/sft_chat.yaml [--set key=value ...]
#
# Partition, account and time limit go on sbatch's command line too. Started again, the run continues in its folder.
#SBATCH --job-name=megalm-sft
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail
config=${1:?usage: sbatch [options] slurm/sft.sh CONFIG [--set key=value ...]}
shift

export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID" \
  megalm/train.py --config "$config" "$@"
