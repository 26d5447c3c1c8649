#!/usr/bin/env bash
# Runs a gin job on a TPU slice of one or more workers, through gcloud's queued resources. See usage below, or --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./run_tpu.sh [OPTIONS] ACTION [-- ARGUMENTS OF mount, run, resume OR copy]

actions, in the order in which they are needed:
  create    ask for the TPU (a queued resource) and wait until it is there; where it was asked for already, only wait
  setup     copy this checkout to it, and make its .venv anew: uv, a Python of uv's, the requirements and jax[tpu]
  mount     BUCKET FOLDER, after --: the bucket's files as a folder of every worker, through Cloud Storage FUSE (gcsfuse,
            which is installed where it is missing); several workers need it for MODEL_DIR, and so does `resume`
  run       start  python -m mpt_jax ARGUMENTS  on every worker; the job goes on when this terminal closes
  status    the state of the queued resource, and for each worker whether the job runs and its log's last line
  logs      follow the job's log on the first worker, or on --worker N (Ctrl-C stops looking, not the job)
  copy      gcloud storage rsync FROM TO  on the first worker, to or from a bucket; both come after --
  stop      let the job save and end, and wait until it has; `run` with the same arguments resumes it
  resume    go on after a preemption, with the options of `create` and the ARGUMENTS of `run`: where the TPU was taken away,
            ask for it anew, `setup`, `mount`, and `run`; where only the job has ended, `mount` and `run`; where the job
            runs, nothing. A TPU's disk is lost with it: MODEL_DIR, and the data that --env names, must be in the bucket
  delete    give the TPU back

options (or the environment variable in brackets):
  --name NAME          of the TPU               [TPU_NAME, default mpt-jax]
  --zone ZONE          such as us-west4-a       [TPU_ZONE, required]
  --project PROJECT                             [TPU_PROJECT, default gcloud's own]
  --type TYPE          accelerator type: which chips and how many [TPU_TYPE, default v5litepod-8]
  --version VERSION    runtime version: the TPU VM's image, which must fit the accelerator type
                                                [TPU_VERSION, default v2-alpha-tpuv5-lite]
  --spot               cheaper, may be taken away [TPU_SPOT=true]
  --env NAME=VALUE     for `run` and `resume`, repeatable: the job's environment, such as MPT_JAX_DATA=/home/me/data or
                       MPT_JAX_CORPUS=…, folders on the TPU VM; this terminal's environment is not passed on
  --mount BUCKET:FOLDER   for `resume`: what `mount` was given
  --worker N           whose log `logs` follows, from 0 [default 0]
  --dry-run            print the commands and run none; of `resume`, those after a preemption
--NAME=VALUE is the same as --NAME VALUE. The queued resource is asked for its state every 20 seconds [TPU_POLL_SECONDS].

example:
  ./run_tpu.sh --zone us-west4-a create && ./run_tpu.sh --zone us-west4-a setup
  ./run_tpu.sh --zone us-west4-a run -- train --gin_file=gin/backbones/t5_1_1_xl.gin --gin_file=gin/methods/prompt_tuning.gin \
    --gin.INITIAL_CHECKPOINT_PATH=gs://my-bucket/xl --gin.MIXTURE_OR_TASK_NAME=mpt_sources --gin.MODEL_DIR=runs/xl
  ./run_tpu.sh --zone us-west4-a copy -- runs/xl gs://my-bucket/runs/xl
on several workers, all of which see the bucket as the folder `bucket` (docs/hosts.md):
  export TPU_ZONE=us-west4-a TPU_TYPE=v5litepod-32
  ./run_tpu.sh create && ./run_tpu.sh setup && ./run_tpu.sh mount -- my-bucket bucket
  ./run_tpu.sh run -- train … --gin.MODEL_DIR=bucket/runs/xl --gin.DataConfig.cache_dir=bucket/cache
and with  export TPU_SPOT=true  before `create`, after a preemption, or at any time to see to it that the job runs:
  ./run_tpu.sh --mount my-bucket:bucket resume -- train … --gin.MODEL_DIR=bucket/runs/xl --gin.DataConfig.cache_dir=bucket/cache
TEXT
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

name=${TPU_NAME:-mpt-jax}
zone=${TPU_ZONE:-}
project=${TPU_PROJECT:-}
type=${TPU_TYPE:-v5litepod-8}
version=${TPU_VERSION:-v2-alpha-tpuv5-lite}
spot=${TPU_SPOT:-false}
poll=${TPU_POLL_SECONDS:-20}
mount=
worker=0
dry_run=false
action=
environment=()
while [ $# -gt 0 ]; do
  if [[ $1 =~ ^(--(name|zone|project|type|version|mount|worker|env))=(.*)$ ]]; then
    set -- "${BASH_REMATCH[1]}" "${BASH_REMATCH[3]}" "${@:2}"
  fi
  case $1 in
    --env)
      [[ ${2:-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env needs NAME=VALUE; see ./run_tpu.sh --help."
      environment+=("$2")
      shift 2
      ;;
    --name | --zone | --project | --type | --version | --mount | --worker)
      # An empty variable before --dry-run would make that the value, and run what should be printed.
      [[ $# -ge 2 && -n $2 && $2 != -* ]] || fail "$1 needs a value, not '${2:-}'; see ./run_tpu.sh --help."
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) spot=true; shift ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) fail "there is no option $1; see ./run_tpu.sh --help." ;;
    *)
      [ -z "$action" ] || fail "two actions, $action and $1; the arguments of an action come after --."
      action=$1
      shift
      ;;
  esac
done
[ -n "$action" ] || { usage >&2; exit 2; }
[ -n "$zone" ] || fail "--zone is not set; give --zone ZONE or TPU_ZONE."
[[ $worker =~ ^[0-9]+$ ]] || fail "--worker is $worker; give a worker's number, from 0."
[[ $spot =~ ^(true|false)$ ]] || fail "TPU_SPOT is $spot; give true or false."
[[ $poll =~ ^[0-9]+([.][0-9]+)?$ ]] || fail "TPU_POLL_SECONDS is $poll; give a number of seconds."
if [[ $action =~ ^(run|resume)$ ]]; then
  [ $# -gt 0 ] || fail "$action needs the arguments of mpt_jax after --, such as: $action -- train --gin_file=…"
elif ! [[ $action =~ ^(mount|copy)$ ]]; then
  [ $# -eq 0 ] || fail "$action takes no arguments; only mount, run, resume and copy do."
fi
[[ $action =~ ^(run|resume)$ ]] || [ ${#environment[@]} -eq 0 ] || fail "--env is for run and resume, not for $action."
[ "$action" = resume ] || [ -z "$mount" ] || fail "--mount is for resume, not for $action."
$dry_run || command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install."

place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")

# Prints a command so that it could be pasted, and runs it unless this is a dry run.
call() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  $dry_run || "$@"
}

# Its arguments as one line that a shell reads back as the same arguments.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# What runs on a worker: `on_workers` sends the text of these functions. Each begins in the worker's home, with set -euo pipefail.

refuse() {
  printf 'error: %s: %s\n' "$HOSTNAME" "$*" >&2
  exit 2
}

# After a restart of the VM the number may be another process's, hence the look at its command line.
job_runs() {
  [ -f mpt_jax.pid ] && grep -qszx mpt_jax "/proc/$(cat mpt_jax.pid)/cmdline"
}

# Arguments: the version of uv. It fetches the Python that requirements.txt is proven on, whatever the image has, and comes by its
# own installer, since an image may lack pip, or refuse to install with it. The environment is made anew, whatever was left in its
# place (from uv's cache, where that has the packages), and the code is replaced; what runs left in the folder stays.
install_checkout() {
  local uv=.uv-$1/uv
  if job_runs; then refuse 'a job is running; stop it before its code is replaced.'; fi
  mkdir -p mpt_jax
  cd mpt_jax
  rm -rf mpt_jax tasks gin tests .venv
  tar -xzf ../mpt_jax.tar.gz
  [ -x "$uv" ] || curl -LsSf "https://astral.sh/uv/$1/install.sh" | UV_UNMANAGED_INSTALL=$PWD/.uv-$1 sh
  "$uv" venv --quiet --python 3.11 .venv
  "$uv" pip install --quiet --python .venv -r requirements.txt "$(sed -n 's/^jax==\([0-9.]*\).*/jax[tpu]==\1/p' requirements.txt)"
}

# Arguments: BUCKET FOLDER.
mount_folder() {
  if ! command -v gcsfuse >/dev/null; then
    # As https://cloud.google.com/storage/docs/cloud-storage-fuse/install has it; a fresh VM may be busy with updates of its own.
    local key=/usr/share/keyrings/cloud.google.asc
    curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    printf 'deb [signed-by=%s] https://packages.cloud.google.com/apt gcsfuse-%s main\n' "$key" "$(lsb_release -c -s)" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    for _ in {1..30}; do
      if sudo apt-get -qq update; then break; fi
      sleep 10
    done
    sudo apt-get -qq -y -o DPkg::Lock::Timeout=300 install gcsfuse
  fi
  cd mpt_jax || refuse 'there is no mpt_jax here; run setup first.'
  mkdir -p "$2"
  # Caches and checkpoints are moved into place as whole folders, which gcsfuse refuses above a limit that is 0 unless it is set.
  mountpoint -q "$2" || gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" "$2"
}

# Arguments: the job's command. A second job on one TPU would wait for the first for ever, so it is refused.
start_job() {
  [ -x mpt_jax/.venv/bin/python ] || refuse 'there is no mpt_jax here; run setup first.'
  if job_runs; then refuse 'a job is running already; stop it first.'; fi
  cd mpt_jax
  nohup setsid "$@" >../mpt_jax.log 2>&1 </dev/null &
  echo $! >../mpt_jax.pid
}

# Prints a line: the worker; running, ended, or never where no job was started; and the last line of its log.
job_state() {
  local state=never line=
  if job_runs; then
    state=running
  elif [ -f mpt_jax.pid ]; then
    state=ended
  fi
  if [ -f mpt_jax.log ]; then line=$(tail -c 4096 mpt_jax.log | tr '\r' '\n' | awk 'NF { line = $0 } END { print line }'); fi
  printf '%s  %s  %s\n' "$HOSTNAME" "$state" "${line:0:200}"
}

stop_job() {
  if ! job_runs; then
    printf '%s: no job is running\n' "$HOSTNAME"
    return
  fi
  kill -TERM "$(cat mpt_jax.pid)" || true
  for _ in {1..600}; do
    if ! job_runs; then
      printf '%s: the job has ended\n' "$HOSTNAME"
      return
    fi
    sleep 1
  done
  refuse 'the job has not ended 10 minutes after SIGTERM; see its log, and stop it again to end it at once.'
}

follow_log() {
  tail -n 200 -F mpt_jax.log
}

# Arguments: FROM TO.
copy_files() {
  cd mpt_jax
  gcloud storage rsync --recursive "$1" "$2"
}

# Runs one of these functions, with its arguments: on_workers WORKERS FUNCTION ARGUMENTS.
on_workers() {
  local text
  text=$(declare -f refuse job_runs "$2")
  call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="set -euo pipefail; $text; $(quoted "${@:2}")"
}

# Prints the queued resource's state, ABSENT where there is none. gcloud may fail now and then, but not five times in a row.
# `list` tells an absence from a failure, as the exit code of `describe` does not. $1 is what a dry run takes for the state.
tpu_state() {
  local list=(gcloud compute tpus queued-resources list "${place[@]}" --format='value(name.basename(),state.state)')
  local rows other other_state state=ABSENT
  if $dry_run; then
    call "${list[@]}"
    printf '%s' "$1"
    return
  fi
  for _ in 1 2 3 4 5; do
    if rows=$("${list[@]}"); then
      while read -r other other_state; do
        if [ "$other" = "$name" ]; then state=$other_state; fi
      done <<<"$rows"
      printf '%s' "$state"
      return
    fi
    sleep "$poll"
  done
  fail "gcloud could not list the queued resources of $zone, five times in a row; see its messages above."
}

# Waits while the state is one that passes, and prints what comes of it: ACTIVE, FAILED, SUSPENDED or ABSENT.
settled_state() {
  local state
  while true; do
    state=$(tpu_state "$1") || exit
    if [[ $state =~ ^(ACTIVE|FAILED|SUSPENDED|ABSENT)$ ]]; then break; fi
    printf '%s  %s\n' "$(date +%T)" "$state" >&2
    sleep "$poll"
  done
  printf '%s' "$state"
}

create() {
  local request=(gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}"
    --accelerator-type="$type" --runtime-version="$version")
  if $spot; then request+=(--spot); fi
  local state
  state=$(settled_state ABSENT)
  if [ "$state" = ABSENT ]; then
    call "${request[@]}"
    state=$(settled_state ACTIVE)
  fi
  [ "$state" = ACTIVE ] || fail "the TPU $name is $state; delete it and create it anew."
  if ! $dry_run; then printf 'the TPU %s is ACTIVE\n' "$name" >&2; fi
}

# In a subshell, whose end is the archive's.
setup() (
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  archive=${TMPDIR:-/tmp}/mpt_jax_$$.tar.gz
  if ! $dry_run; then trap 'rm -f "$archive"' EXIT; fi
  call tar -czf "$archive" -C "$here" --exclude=./.git --exclude=./.venv --exclude='./.*_cache' --exclude=./runs \
    --exclude=__pycache__ .
  call gcloud compute tpus tpu-vm scp "$archive" "$name:mpt_jax.tar.gz" "${place[@]}" --worker=all
  on_workers all install_checkout 0.13.9
)

run() {
  on_workers all start_job env ${environment[@]+"${environment[@]}"} .venv/bin/python -m mpt_jax "$@"
  if $dry_run; then return; fi
  printf 'started; follow it with: %s\n' "$(quoted "$0" --name="$name" "${place[@]}" logs)" >&2
}

mount_bucket() {
  [[ $# -eq 2 && ${1#gs://} =~ ^[^:/]+$ ]] || fail "mount needs a BUCKET and a FOLDER after --, such as: mount -- my-bucket bucket."
  on_workers all mount_folder "${1#gs://}" "$2"
}

status() {
  local state
  state=$(tpu_state ACTIVE)
  if ! $dry_run; then printf '%s  %s\n' "$name" "$state"; fi
  if [ "$state" = ACTIVE ]; then on_workers all job_state; fi
}

resume() {
  [[ ${mount#gs://} =~ ^([^:/]+):(.+)$ ]] ||
    fail "--mount is '$mount'; give BUCKET:FOLDER, the bucket that holds MODEL_DIR, since a TPU's disk is lost with it."
  local bucket=${BASH_REMATCH[1]} folder=${BASH_REMATCH[2]} state jobs
  state=$(settled_state SUSPENDED)
  if [[ $state =~ ^(FAILED|SUSPENDED)$ ]]; then delete --quiet; fi
  create
  jobs=$(on_workers all job_state)
  local job workers=0 running=0 ended=0
  while read -r _ job _; do
    case $job in
      running) running=$((running + 1)) ;;
      ended) ended=$((ended + 1)) ;;
    esac
    workers=$((workers + 1))
  done <<<"$jobs"
  if [ $running -eq $workers ]; then
    printf 'the job is running already; nothing to resume\n' >&2
    return
  fi
  [ $running -eq 0 ] || fail "the job runs on $running of $workers workers; stop it, and resume again."
  # A worker that never had a job may have no code, either.
  if [ $ended -lt $workers ]; then setup; fi
  mount_bucket "$bucket" "$folder"
  run "$@"
}

copy() {
  [ $# -eq 2 ] || fail "copy needs FROM and TO after --, such as: copy -- runs/xl gs://BUCKET/runs/xl."
  on_workers 0 copy_files "$@"
}

delete() {
  call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force "$@"
}

case $action in
  create) create ;;
  setup) setup ;;
  mount) mount_bucket "$@" ;;
  run) run "$@" ;;
  status) status ;;
  logs) on_workers "$worker" follow_log ;;
  copy) copy "$@" ;;
  stop) on_workers all stop_job ;;
  resume) resume "$@" ;;
  delete) delete ;;
  *) fail "there is no action $action; see ./run_tpu.sh --help." ;;
esac
