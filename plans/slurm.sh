#!/bin/bash
# One sweep on many machines under Slurm: every task is a worker that leases jobs from one shared folder.
#   nbhelpers sweep plan plans/pruning_grid.yaml --out "$SHARED"     # once, on the login node: leaves the probe
#   sbatch --export=ALL,SHARED=/shared/my-sweep plans/slurm.sh       # again after a time limit: it goes on
#SBATCH --job-name=nbhelpers-sweep
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
# USR1 comes two minutes before the end: a worker stops its job, keeps what it has, and gives the lease back.
set -eu
: "${SHARED:?set SHARED to a folder that all machines see}"
PLAN="${PLAN:-$SHARED/workers/plan.json}"  # the plan that was laid down
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}" HF_HUB_OFFLINE=1
srun nbhelpers sweep worker "$PLAN" --folder "$SHARED"
