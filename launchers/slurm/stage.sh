#!/usr/bin/env bash
# The whole of a stage's job, sourced by the scripts beside it and by those that launchers/submit.py writes:
#
#   source stage.sh STAGE RECIPE [--section.field VALUE ...]
#
# One task for each process that SLURM was asked for; they meet on the job's first node. No ssh, no hostfile.
#
# What ends a job, and what becomes of it:
#   status 0               done.
#   status 2               the recipe or the data are refused: nothing that another try would mend.
#   a signal               USR1 (--signal, before the time limit; or `scancel --signal=USR1 JOB`) or TERM: a training
#                          stage writes a checkpoint at the next step's boundary, and the job requeues itself.
#   scancel, preemption    SLURM ends the job: a checkpoint likewise; whether it comes back is SLURM's decision.
#   an unhealthy node      it is named, excluded from this job, and the job requeues itself.
#   anything else          the job requeues itself and goes on from the last whole checkpoint, TAGI_DS_DEATHS times.
#
# Read from the environment, all optional:
#   TAGI_DS_HOME           the checkout; default: where sbatch was called.
#   TAGI_DS_DEATHS         deaths after which a job is given up (3).
#   TAGI_DS_HEALTH         0: the nodes are not checked before the stage.
#   TAGI_DS_HEALTH_S       seconds within which every process of that check must have spoken, its start included (180).
#   PYTHON                 the interpreter (python).
# Arrays that the sourcing script may set:
#   srun_options           e.g. srun_options=(--container-image=/images/tagi.sqsh --container-mounts=/data)
#   wrap                   words before the interpreter, e.g. wrap=(apptainer exec --nv /images/tagi.sif)
#
# Network: nothing is set here. Where NCCL or gloo choose a wrong interface or adapter, say so in your environment or
# in the cluster file's `setup`, and look at what NCCL_DEBUG=INFO tells first:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   interface of bootstrap and of gloo, e.g. ib0 or bond0 (=^docker0,lo to omit)
#   NCCL_IB_HCA                              InfiniBand adapters, e.g. mlx5_0,mlx5_1
#   FI_PROVIDER=efa, NCCL_NET_PLUGIN         where the fabric has a plugin of its own
# NCCL_IB_DISABLE=1 and NCCL_P2P_DISABLE=1 are diagnoses, not settings: with them everything works, and slowly.
set -u

stage=$1
shift
[[ $# -eq 0 || $1 == --* ]] || set -- --config "$@"
home=${TAGI_DS_HOME:-$SLURM_SUBMIT_DIR}
python=${PYTHON:-python}
declare -a srun_options=("${srun_options[@]}") wrap=("${wrap[@]}")
# The last task of an array has the array's own id: by that id alone SLURM would take all of them.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

say() { echo "[slurm $(date '+%F %T') job $job${SLURM_RESTART_COUNT:+ restart $SLURM_RESTART_COUNT}] $*"; }

# As SLURM has it, for this job: `field Comment`.
field() { scontrol show job "$job" --oneliner | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

is_being_ended() { [[ $ended == 1 || $(squeue --noheader --jobs="$job" --format=%T) != RUNNING ]]; }

# requeue [NODES]: back into the queue, from now on without these nodes. SLURM then ends this script.
requeue() {
  local excluded
  excluded=$(field ExcNodeList)
  trap '' TERM
  scontrol requeue "$job" || exit 1
  # Only a job that is not running can be given other nodes.
  if [[ -n ${1:-} ]]; then
    [[ -z $excluded || $excluded == "(null)" ]] || set -- "$excluded,$1"
    scontrol update JobId="$job" ExcNodeList="$1"
  fi
  exit 0
}

# A restart for whatever is not the user's mistake, a few times.
requeue_after_death() {
  local deaths limit=${TAGI_DS_DEATHS:-3}
  deaths=$(field Comment)
  deaths=${deaths#deaths=}
  [[ $deaths =~ ^[0-9]+$ ]] || deaths=0
  if ((deaths >= limit)); then
    say "$stage: ended with status $status for the $((deaths + 1))th time, and is given up; sbatch it again to go on"
    exit "$status"
  fi
  scontrol update JobId="$job" Comment="deaths=$((deaths + 1))"
  say "$stage: ended with status $status; requeued, to go on from its last checkpoint (death $((deaths + 1)) of $limit)"
  requeue "${1:-}"
}

# step WORDS: runs them as every task; their highest status in `status`. Signals that come meanwhile are handed on.
# Tasks whose peer fails end by themselves, with its status; only after that time does SLURM kill them.
step() {
  srun --wait=120 --kill-on-bad-exit=0 "${srun_options[@]}" "${wrap[@]}" "$@" &
  local pid=$!
  while true; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
}

status=0 ended=0
# The tasks hear TERM themselves; USR1 only where SLURM was told to signal this script (--signal=B:USR1).
trap 'ended=1' TERM
trap 'scancel --signal=USR1 "$job"' USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# By the address that SLURM itself has of the node: its name need not resolve.
MASTER_ADDR=$(scontrol show node "$first" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first}
# Below the ports that the system hands out; another one after a restart, since the old one may still be held.
export MASTER_PORT=$((10000 + (SLURM_JOB_ID * 13 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# srun does not take this over from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# The package, wherever it is not installed.
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}

say "$stage: ${SLURM_NTASKS:-1} processes on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"
if [[ ${TAGI_DS_HEALTH:-1} != 0 ]]; then
  TAGI_DS_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  export TAGI_DS_NODES
  status=0
  # Rank 0 waits so long from its own start on, then for two sums; what one process says by ending must not end it.
  answer_s=${TAGI_DS_HEALTH_S:-180}
  answer_s=${answer_s%.*}
  # By way of a variable: the disk may be what is broken.
  report=$(timeout $((2 * answer_s + 300)) \
    srun --wait=$((answer_s + 200)) --kill-on-bad-exit=0 "${srun_options[@]}" "${wrap[@]}" \
    "$python" -m tagi_ds.cluster.health "$stage" "$@" 2>&1) || status=$?
  [[ -z $report ]] || echo "$report"
  unhealthy=$(sed -n 's/^unhealthy \([^ :]*\): .*/\1/p' <<<"$report" | sort -u | paste -sd,)
  if [[ $status != 0 ]] && ! is_being_ended; then
    [[ -z $unhealthy ]] || say "$stage: without $unhealthy from now on"
    [[ $status == 2 || $status == 138 ]] || requeue_after_death "$unhealthy"
  fi
fi

((status != 0)) || step "$python" -u "$home/launchers/$stage.py" "$@"
case $status in
  0) say "$stage: done" ;;
  2) say "$stage: refused, see above; mend it and sbatch again" ;;
  # Stopped by INT, USR1 or TERM; before Python hears signals the latter two end it outright.
  130 | 138 | 143)
    if is_being_ended; then
      say "$stage: ended by SLURM"
    else
      say "$stage: told to make way; requeued"
      requeue
    fi
    ;;
  *)
    is_being_ended || requeue_after_death
    say "$stage: ended by SLURM (status $status)"
    ;;
esac
exit "$status"
