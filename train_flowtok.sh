#!/usr/bin/env bash
# Trains the stages of one or more experiments in order, on 1..N machines: sets up the environment if needed, checks
# everything that can be known, runs the stages, draws samples.
#
#   bash train_flowtok.sh [EXPERIMENT ...] [key=value ...]
#
# EXPERIMENT is a folder of configs/, or the path of one elsewhere (with a /); default: scenes. Several run one after the
# other. The stages of an experiment are the YAML files in its folder, always run in this order:
#   scenes artists  text_encoder  tokenizer  tokens  text_projector  flowtok  the rounds of the paper; two make images
#   tokens_finetune  flowtok_finetune                                    fine-tuning on other data
#   tokenizer_512  tokens_512  flowtok_512                               at 512 px
#   text_decoder  flowtok_caption                                        image to text
#   next_scale  reader                                                   discrete codes: text to image, to captions
#   report
# A finished stage is skipped, an interrupted one resumes: run the same command again. text_encoder is skipped where the
# tokenizer names another text tower, reader where requirements-text.txt is not installed.
#
#   bash train_flowtok.sh                                            the demo, scenes: one CPU or GPU, no downloads
#   bash train_flowtok.sh tokenizer_bl77_256 flowtok_xl data_dir=/data/shards    8 A100s of this machine: all are found
#   bash train_flowtok.sh mine runs_dir=/data/runs                   an experiment of your own, results in /data/runs/mine
#   CUDA_VISIBLE_DEVICES=0,1 bash train_flowtok.sh mine              two GPUs; CUDA_VISIBLE_DEVICES= for the CPU
#   STAGES="tokenizer tokens" bash train_flowtok.sh mine             some of the stages
#   DRY_RUN=1 bash train_flowtok.sh mine                             checks the configs, prints the commands, runs nothing
# (mine: a folder configs/mine that you made, e.g. a copy of configs/emoji)
# Overrides:
#   key=value        goes to every chosen stage, e.g. data_dir=DIR, where image shards are, runs_dir=DIR, the folder of all
#                    results (default: runs; relative paths start at this file's folder), or experiment_dir=DIR
#                    (default: RUNS_DIR/EXPERIMENT)
#   STAGE.key=value  goes to that stage only, without "STAGE.": tokenizer.training.max_steps=1000. A first word that
#                    names a stage always is the stage: the width in stage flowtok is flowtok.flowtok.width=768
#
# Several machines: the same command once on each, with the repository, data and runs_dir on a shared file system.
#   Two nodes x 8 GPUs, Slurm (here or inside sbatch); everything below is read from Slurm's variables:
#     srun --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --cpus-per-task 64 bash train_flowtok.sh mine
#   Two nodes by hand; the second with MACHINE_RANK=1:
#     NUM_MACHINES=2 MACHINE_RANK=0 MAIN_PROCESS_IP=node0 bash train_flowtok.sh mine
# Variables; where one is not set: Slurm's or torchrun's (WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_*), then
#   NUM_MACHINES=1  MACHINE_RANK=0
#   MAIN_PROCESS_IP    host of machine rank 0
#   MAIN_PROCESS_PORT  29500 for several machines; 0, a free port, for one
#   NUM_PROCESSES      of the whole job, all machines together: one a GPU; without GPUs, training.cpu_processes a machine
#   OMP_NUM_THREADS    of each process: without GPUs its share of all cores, 1 with them
#   MALLOC_{MMAP_THRESHOLD,TRIM_THRESHOLD,TOP_PAD}_    on the CPU: 32 GiB, 32 GiB, 1 GiB; glibc keeps what a step frees
#
# SIGUSR1 (Slurm's warning), SIGTERM or Ctrl-C: the running stage finishes its step, writes a checkpoint, and this command
# ends with status 75: run it again to go on (scripts/slurm.sbatch requeues itself). A second signal ends it at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' train_flowtok.sh
    exit
fi
trap '' USR1 # a warning does not end the set-up, and Python ignores it until it listens
source scripts/environment.sh
set_up_environment requirements.txt
[[ -x $PYTHON ]] || exit 0 # DRY_RUN=1 has printed how it is made
exec "$PYTHON" -m scripts.run_experiment "$@"
