#!/bin/bash
# Several machines under SLURM: one launcher per machine, which starts one process per GPU.
#   sbatch recipes/accelerate/slurm.sh recipes/qwen2_vl_7b/decision_maker.yaml [--key value ...]
# The batch grows with the number of processes. To keep the recipe's batch size, divide gradient_accumulation_steps by
# that number. A job resumes only with the batch size of its first run.
#SBATCH --job-name=echo-ft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue # a requeued job resumes from the last complete checkpoint
set -euo pipefail

recipe=${1:?give the recipe of a role, such as recipes/qwen2_vl_7b/decision_maker.yaml}
shift
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN
export PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a machine

# Each machine evaluates its own SLURM_NODEID, hence the single quotes.
# shellcheck disable=SC2016
# SLURM 22.05 to 23.02 does not pass --cpus-per-task on to srun, which would leave one core to all processes.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c 'python -m train.launch --config_file recipes/accelerate/ddp.yaml \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
  --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --main_process_ip "$MAIN" --main_process_port "$PORT" \
  train/sft.py --config "$@"' launch "$recipe" --resume_from_checkpoint true "$@"
