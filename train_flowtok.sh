#!/usr/bin/env bash
# Trains the stages of one experiment in order, on 1..N machines, sets up the environment if needed, and draws samples.
#
#   bash train_flowtok.sh [EXPERIMENT] [key=value ...]
#
# EXPERIMENT is a folder of configs/ (default: demo). Its stages are the YAML files in it, always run in this order:
#   text_encoder  tokenizer  tokens  text_projector  flowtok             the rounds of the paper:
#   tokens_finetune  flowtok_finetune                                    fine-tuning on other data
#   tokenizer_512  tokens_512  flowtok_512                               at 512 px
#   text_decoder  flowtok_caption                                        image to text
#   report
# A finished stage is skipped, an interrupted one resumes: run the same command again.
#
#   bash train_flowtok.sh                                            the demo: one CPU or GPU, no downloads of data
#   bash train_flowtok.sh flowtok_xl data_dir=/data/shards           8 A100s of this machine: all GPUs are found
#   bash train_flowtok.sh mine experiment_dir=/data/runs/mine        an experiment of your own
#   CUDA_VISIBLE_DEVICES=0,1 bash train_flowtok.sh mine              two of them; CUDA_VISIBLE_DEVICES= for the CPU
#   STAGES="tokenizer tokens" bash train_flowtok.sh mine             some of the stages
#   DRY_RUN=1 bash train_flowtok.sh mine                             prints the commands, runs nothing
# (mine: a folder configs/mine that you made, e.g. a copy of configs/demo)
# Overrides:
#   key=value        goes to every chosen stage, e.g. experiment_dir=DIR, the folder of all results (default:
#                    runs/EXPERIMENT; relative paths start at this file's folder)
#   STAGE.key=value  goes to that stage only, without "STAGE.": tokenizer.training.max_steps=1000. A first word that
#                    names a stage always is the stage: the width in stage flowtok is flowtok.flowtok.width=768
#
# Several machines: the same command once on each, with the repository, data and experiment_dir on a shared file system.
#   Two nodes x 8 GPUs, Slurm (here or inside sbatch); everything below is read from Slurm's variables:
#     srun --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --cpus-per-task 64 bash train_flowtok.sh mine
#   Two nodes by hand; the second with MACHINE_RANK=1:
#     NUM_MACHINES=2 MACHINE_RANK=0 MAIN_PROCESS_IP=node0 bash train_flowtok.sh mine
# Variables; where one is not set: Slurm's or torchrun's (WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_*), then
#   NUM_MACHINES=1  MACHINE_RANK=0
#   MAIN_PROCESS_IP    host of machine rank 0
#   MAIN_PROCESS_PORT  29500 for several machines; 0, a free port, for one
#   NUM_PROCESSES      of the whole job, all machines together: one a GPU; without GPUs, one a machine with all its cores
#   MALLOC_{MMAP_THRESHOLD,TRIM_THRESHOLD,TOP_PAD}_    on the CPU: 32 GiB, 32 GiB, 1 GiB; glibc keeps what a step frees
#
# SIGUSR1 (Slurm's warning), SIGTERM or Ctrl-C: the running stage finishes its step, writes a checkpoint, and this command
# ends with status 75: run it again to go on (scripts/slurm.sbatch requeues itself). A second signal ends it at once.
set -euo pipefail
command_line="bash train_flowtok.sh$([[ $# -eq 0 ]] || printf ' %q' "$@")"
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh

ALL_STAGES=(text_encoder tokenizer tokens text_projector flowtok tokens_finetune flowtok_finetune
    tokenizer_512 tokens_512 flowtok_512 text_decoder flowtok_caption report)

fail() {
    echo "train_flowtok.sh: $*" >&2
    exit 2
}

contains() { # WORD LIST...
    local word=$1
    shift
    [[ " $* " == *" $word "* ]]
}

stages_of() { # EXPERIMENT -> the stages that its folder configures
    local stage
    for stage in "${ALL_STAGES[@]}"; do
        if [[ -f configs/$1/$stage.yaml ]]; then echo "$stage"; fi
    done
}

list_experiments() {
    local folder
    for folder in configs/*/; do
        folder=$(basename "$folder")
        if [[ -n $(stages_of "$folder") ]]; then printf '%s ' "$folder"; fi
    done
}

# --- What to run: experiment, stages, overrides ---

choose_stages() { # -> stages: those in STAGES, or all that the experiment has
    local stage present wanted
    mapfile -t present < <(stages_of "$experiment")
    [[ ${#present[@]} -gt 0 ]] || fail "no experiment '$experiment'; valid: $(list_experiments)"
    read -ra wanted <<<"${STAGES:-${present[*]}}"
    [[ ${#wanted[@]} -gt 0 ]] || fail "STAGES names no stage; the stages of $experiment: ${present[*]}"
    for stage in "${wanted[@]}"; do
        contains "$stage" "${ALL_STAGES[@]}" || fail "no stage '$stage' (STAGES); valid: ${ALL_STAGES[*]}"
        contains "$stage" "${present[@]}" || fail "configs/$experiment has no $stage.yaml; its stages: ${present[*]}"
    done
    stages=()
    for stage in "${present[@]}"; do
        if contains "$stage" "${wanted[@]}"; then stages+=("$stage"); fi
    done
}

stage_of_override() { # KEY=VALUE -> the stage that it is for; nothing: all stages
    local key=${1%%=*}
    if [[ $key == *.* ]] && contains "${key%%.*}" "${ALL_STAGES[@]}"; then echo "${key%%.*}"; fi
}

check_overrides() { # KEY=VALUE ... -> experiment_dir
    local override stage
    experiment_dir=runs/$experiment
    for override in "$@"; do
        [[ $override == ?*=* ]] || fail "argument '$override' is not of the form key=value"
        [[ $override != experiment_dir=* ]] || experiment_dir=${override#*=}
        stage=$(stage_of_override "$override")
        [[ -z $stage ]] || contains "$stage" "${stages[@]}" ||
            fail "'$override' is for stage $stage, which is not among those to run: ${stages[*]}." \
                "A key '$stage' of another stage takes that stage's name in front, e.g. ${stages[0]}.$override"
    done
}

overrides_of() { # STAGE KEY=VALUE ... -> overrides: the stage's own, in the order given
    local stage=$1 override target
    shift
    overrides=("experiment_dir=$experiment_dir")
    for override in "$@"; do
        [[ $override != experiment_dir=* ]] || continue
        target=$(stage_of_override "$override")
        case $target in
            "") overrides+=("$override") ;;
            "$stage") overrides+=("${override#"$stage".}") ;;
        esac
    done
}

# --- Where to run: machines, processes, GPUs ---

find_machines() { # -> NUM_MACHINES MACHINE_RANK MAIN_PROCESS_IP MAIN_PROCESS_PORT, and NUM_PROCESSES if torchrun's are set
    local local_rank=${SLURM_LOCALID:-${LOCAL_RANK:-0}}
    [[ $local_rank == 0 ]] || fail "started more than once on this machine; start it once on each (--ntasks-per-node 1)"
    if [[ -n ${SLURM_NNODES:-} ]]; then
        NUM_MACHINES=${NUM_MACHINES:-$SLURM_NNODES}
        MACHINE_RANK=${MACHINE_RANK:-${SLURM_NODEID:-0}}
    elif [[ -n ${WORLD_SIZE:-} && -n ${LOCAL_WORLD_SIZE:-} ]]; then
        NUM_PROCESSES=${NUM_PROCESSES:-$WORLD_SIZE}
        NUM_MACHINES=${NUM_MACHINES:-$((WORLD_SIZE / LOCAL_WORLD_SIZE))}
        MACHINE_RANK=${MACHINE_RANK:-${GROUP_RANK:-0}}
    fi
    NUM_MACHINES=${NUM_MACHINES:-1}
    MACHINE_RANK=${MACHINE_RANK:-0}
    [[ $NUM_MACHINES =~ ^[1-9][0-9]*$ ]] || fail "NUM_MACHINES=$NUM_MACHINES is not a number >= 1"
    [[ $MACHINE_RANK =~ ^[0-9]+$ ]] || fail "MACHINE_RANK=$MACHINE_RANK is not a number >= 0"
    ((MACHINE_RANK < NUM_MACHINES)) || fail "MACHINE_RANK=$MACHINE_RANK must be below NUM_MACHINES=$NUM_MACHINES"
    MAIN_PROCESS_IP=${MAIN_PROCESS_IP:-${MASTER_ADDR:-}}
    MAIN_PROCESS_PORT=${MAIN_PROCESS_PORT:-${MASTER_PORT:-$((NUM_MACHINES > 1 ? 29500 : 0))}}
    if ((NUM_MACHINES == 1)); then
        MAIN_PROCESS_IP=${MAIN_PROCESS_IP:-127.0.0.1}
    elif [[ -z $MAIN_PROCESS_IP && -n ${SLURM_JOB_NODELIST:-} ]] && command -v scontrol >/dev/null; then
        MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    fi
    [[ -n $MAIN_PROCESS_IP ]] || fail "$NUM_MACHINES machines: set MAIN_PROCESS_IP to the host of machine rank 0"
    # What another launcher left would make our single processes wait for a group that nobody forms.
    unset RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
}

count_gpus() { # GPUs that torch would use; a dry run has no torch and asks the driver
    local visible gpus
    if [[ ${DRY_RUN:-0} == 0 ]]; then
        "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
        return
    fi
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES#-1}"
        gpus=$((${#visible[@]} < gpus ? ${#visible[@]} : gpus))
    fi
    echo "$gpus"
}

prepare_launch() { # -> launch: the command in front of a training script
    local gpus per_machine cores threads
    gpus=$(count_gpus)
    NUM_PROCESSES=${NUM_PROCESSES:-$((gpus > 0 ? gpus * NUM_MACHINES : NUM_MACHINES))}
    [[ $NUM_PROCESSES =~ ^[1-9][0-9]*$ ]] || fail "NUM_PROCESSES=$NUM_PROCESSES is not a number >= 1"
    per_machine=$((NUM_PROCESSES / NUM_MACHINES))
    ((per_machine * NUM_MACHINES == NUM_PROCESSES)) ||
        fail "NUM_PROCESSES=$NUM_PROCESSES, of the whole job, must be a multiple of NUM_MACHINES=$NUM_MACHINES"
    ((gpus == 0 || per_machine <= gpus)) ||
        fail "NUM_PROCESSES=$NUM_PROCESSES on $NUM_MACHINES machine(s) needs $per_machine GPUs a machine; here are $gpus"

    # The config sets the precision in code. --multi_gpu is accelerate's name for "through torchrun": with
    # ACCELERATE_USE_CPU it starts gloo processes on the CPU, where `--cpu --num_processes 2` would start only one.
    launch=("$PYTHON" -m accelerate.commands.launch --num_processes "$NUM_PROCESSES" --num_machines "$NUM_MACHINES"
        --machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT"
        --mixed_precision no --dynamo_backend no)
    if ((NUM_PROCESSES > 1)); then launch+=(--multi_gpu); fi
    if ((gpus == 0)); then
        cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
        threads=${OMP_NUM_THREADS:-$((cores > per_machine ? cores / per_machine : 1))}
        launch+=(--num_cpu_threads_per_process "$threads")
        if ((NUM_PROCESSES > 1)); then launch=(ACCELERATE_USE_CPU=true "${launch[@]}"); else launch+=(--cpu); fi
        keep_freed_memory
        launch=(env "${launch[@]}")
    fi
}

# A third of a large network's step on a CPU can go into memory that glibc's malloc gives back and faults in again.
keep_freed_memory() { # adds what makes malloc keep it to launch; variables that are set already stay
    local setting name
    [[ $OSTYPE == linux-gnu* ]] || return 0
    for setting in MALLOC_TOP_PAD_=$((1 << 30)) MALLOC_{TRIM,MMAP}_THRESHOLD_=$((1 << 35)); do
        name=${setting%=*}
        if [[ -z ${!name+set} ]]; then launch=("$setting" "${launch[@]}"); fi
    done
}

# --- Run ---

processes_of() { # PID -> it and all that it has started; a group would not do: torchrun gives each trainer its own
    local pid
    echo "$1"
    for pid in $(pgrep -P "$1" || grep -ls "^PPid:[[:space:]]*$1\$" /proc/[0-9]*/status | cut -d/ -f3); do
        processes_of "$pid"
    done
}

send() { # SIGNAL PID: to all processes of the command
    # shellcheck disable=SC2046
    kill -s "$1" $(processes_of "$2")
}

pass_on() { # CHILD: the first signal asks the trainers to stop after their step, the next ones end them
    interrupted=$((interrupted + 1))
    case $interrupted in
        1) (while send USR1 "$1"; do sleep 5; done) >/dev/null & ;; # again: one that starts up does not hear it
        2) send TERM "$1" ;;
        *) send KILL "$1" ;;
    esac 2>/dev/null || true
}

run_stoppable() { # COMMAND ...: like run, and passes signals on to all processes of the command
    local words child status waited
    [[ ${DRY_RUN:-0} == 0 ]] || { run "$@"; return; }
    printf -v words ' %q' "$@"
    echo "+$words"
    set -m # its own process group; launchers and data workers in it ignore the signal, the trainers catch it
    (trap '' USR1; exec "$@") &
    set +m
    child=$!
    # shellcheck disable=SC2064
    trap "pass_on $child" USR1 TERM INT HUP
    if ((interrupted > 0)); then # just before the trap
        interrupted=0
        pass_on "$child"
    fi
    waited=$interrupted
    while :; do
        status=0
        wait "$child" || status=$?
        ((waited < interrupted)) || break # else a signal, not the end of the child, ended the waiting
        waited=$interrupted
    done
    trap - TERM INT HUP
    note_warnings
    return "$status"
}

note_warnings() { # while no stage runs, Slurm's warning only keeps the next one from starting
    trap 'interrupted=1' USR1
}

stop_if_warned() {
    ((interrupted > 0)) || return 0
    echo "train_flowtok.sh: told to stop before stage $1; to go on, run the same command again: $command_line"
    exit 75
}

stopped_cleanly() { # STAGE FILE: whether its training left the note of a clean stop, after FILE was made
    local folder
    folder=$("$PYTHON" -m configs.load "configs/$experiment/$1.yaml" "${overrides[@]}" | sed -n 's/^run_dir: //p')
    [[ $folder/stopped -nt $2 ]]
}

stopped() { # STAGE STATUS
    echo "train_flowtok.sh: $1 failed (exit status $2); the reason is above." >&2
    echo "Its results so far are in $experiment_dir. To resume, run the same command again: $command_line" >&2
    exit "$2"
}

check_experiment() { # KEY=VALUE ... : every stage's config, before the first one runs
    local stage group=()
    for stage in "${stages[@]}"; do
        overrides_of "$stage" "$@"
        group+=(-- "configs/$experiment/$stage.yaml" "${overrides[@]}")
    done
    (trap '' USR1 && run "$PYTHON" -m configs.check "$NUM_PROCESSES" "${group[@]:1}") || exit $?
}

run_stage() { # STAGE KEY=VALUE ...
    local stage=$1 start=$SECONDS overrides program status before
    stop_if_warned "$stage"
    overrides_of "$@"
    before=$(mktemp)
    case $stage in
        text_encoder) program=("${launch[@]}" --module scripts.train_text_encoder) ;;
        tokens*) program=("${launch[@]}" --module scripts.encode_tokens) ;;
        report) program=("$PYTHON" -m eval.report) ;;
        text_projector | text_decoder) program=("${launch[@]}" "train_$stage.py") ;;
        *) program=("${launch[@]}" "train_${stage%%_*}.py") ;; # tokenizer, flowtok and their further rounds
    esac
    echo "== $experiment: $stage"
    run_stoppable "${program[@]}" --config "configs/$experiment/$stage.yaml" "${overrides[@]}" || {
        status=$?
        if stopped_cleanly "$stage" "$before"; then
            rm -f "$before"
            echo "train_flowtok.sh: stage $stage stopped cleanly; to go on, run the same command again: $command_line"
            exit 75
        fi
        rm -f "$before"
        stopped "stage $stage" "$status"
    }
    rm -f "$before"
    echo "== $experiment: $stage took $((SECONDS - start)) s"
}

draw_samples() { # STAGE: a flowtok round, images or captions; nothing to do if the picture is newer than its checkpoints
    local folder=$experiment_dir/$1 picture=$experiment_dir/samples${1#flowtok}.png
    if [[ -f $picture && -z $(find "$folder/checkpoints" -newer "$picture" -print -quit) ]]; then
        echo "$picture: complete, nothing to do"
    else
        (trap '' USR1 && run "$PYTHON" sample.py --run "$folder" --output "$picture") || stopped sample.py $?
    fi
}

list_results() {
    local path
    echo "Results in $experiment_dir:"
    for path in samples{,_finetune,_512,_caption}.png report.json "${ALL_STAGES[@]}"; do
        if [[ -e $experiment_dir/$path ]]; then echo "  $experiment_dir/$path"; fi
    done
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' train_flowtok.sh
    exit
fi
experiment=demo
if [[ $# -gt 0 && $1 != *=* ]]; then
    experiment=$1
    shift
fi
interrupted=0 # how often this was told to stop
trap '' USR1  # and so do the commands of the set-up
choose_stages
check_overrides "$@"
find_machines
set_up_environment requirements.txt
prepare_launch
note_warnings
check_experiment "$@"

for stage in "${stages[@]}"; do
    # One process writes the report.
    if [[ $stage != report || $MACHINE_RANK == 0 ]]; then run_stage "$stage" "$@"; fi
done
if [[ $MACHINE_RANK == 0 ]]; then
    for stage in "${stages[@]}"; do
        if [[ $stage == flowtok* ]]; then draw_samples "$stage"; fi
    done
    [[ ${DRY_RUN:-0} != 0 ]] || list_results
fi
