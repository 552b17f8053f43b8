#!/usr/bin/env bash
# Work through a recipe with Slurm, on the cores of one node.
#
#   sbatch --cpus-per-task 32 slurm/curate.sh configs/data/web_en_zh.yaml [--set key=value ...]
#
# On many nodes: python tools/curate.py --config FILE --executor slurm --jobs 100 --workers 32, which submits this script
# as arrays, from any folder. By hand, submit it in megalm's. Partition, account and time limit go on sbatch's command
# line too. A job that was ended continues from its last chunk when it is submitted again.
#SBATCH --job-name=megalm-curate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
exec "${PYTHON:-python}" "${MEGALM_FOLDER:-.}/tools/curate.py" --config "$@"
