#!/usr/bin/env bash
# Runs a gin job on a TPU slice of one or more workers, through gcloud's queued resources. See usage below, or --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./run_tpu.sh [OPTIONS] ACTION [-- ARGUMENTS OF mount, run OR copy]

actions, in the order in which they are needed:
  create    ask for the TPU (a queued resource) and wait until it is there
  setup     copy this checkout to it and install its requirements with jax[tpu]
  mount     BUCKET FOLDER, after --: the bucket's files as a folder of every worker, through Cloud Storage FUSE (gcsfuse);
            a slice of several workers needs it for MODEL_DIR
  run       start  python -m mpt_jax ARGUMENTS  on every worker; the job goes on when this terminal closes
  logs      follow the job's log on the first worker, or on --worker N (Ctrl-C stops looking, not the job)
  copy      gcloud storage rsync FROM TO  on the first worker, to or from a bucket; both come after --
  stop      end the job; `run` with the same arguments resumes it
  delete    give the TPU back

options (or the environment variable in brackets):
  --name NAME          of the TPU               [TPU_NAME, default mpt-jax]
  --zone ZONE          such as us-west4-a       [TPU_ZONE, required]
  --project PROJECT                             [TPU_PROJECT, default gcloud's own]
  --type TYPE          accelerator type: which chips and how many [TPU_TYPE, default v5litepod-8]
  --version VERSION    runtime version: the TPU VM's image, which must fit the accelerator type
                                                [TPU_VERSION, default v2-alpha-tpuv5-lite]
  --python PYTHON      the interpreter on the TPU VM that `setup` makes .venv with, Python 3.11 to 3.13; this machine's does
                       not matter               [TPU_PYTHON, default python3]
  --env NAME=VALUE     for `run`, repeatable: the job's environment, such as MPT_JAX_DATA=/home/me/data or
                       MPT_JAX_CORPUS=…, folders on the TPU VM; this terminal's environment is not passed on
  --worker N           whose log `logs` follows, from 0 [default 0]
  --spot               cheaper, may be taken away
  --dry-run            print the commands and run none
--NAME=VALUE is the same as --NAME VALUE.

example:
  ./run_tpu.sh --zone us-west4-a create && ./run_tpu.sh --zone us-west4-a setup
  ./run_tpu.sh --zone us-west4-a run -- train --gin_file=gin/backbones/t5_1_1_xl.gin --gin_file=gin/methods/prompt_tuning.gin \
    --gin.INITIAL_CHECKPOINT_PATH=gs://my-bucket/xl --gin.MIXTURE_OR_TASK_NAME=mpt_sources --gin.MODEL_DIR=runs/xl
  ./run_tpu.sh --zone us-west4-a copy -- runs/xl gs://my-bucket/runs/xl
on several workers, all of which see the bucket as the folder `bucket` (docs/hosts.md):
  export TPU_ZONE=us-west4-a TPU_TYPE=v5litepod-32
  ./run_tpu.sh create && ./run_tpu.sh setup && ./run_tpu.sh mount -- my-bucket bucket
  ./run_tpu.sh run -- train … --gin.MODEL_DIR=bucket/runs/xl --gin.DataConfig.cache_dir=bucket/cache
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
python=${TPU_PYTHON:-python3}
worker=0
spot=false
dry_run=false
action=
environment=()
while [ $# -gt 0 ]; do
  if [[ $1 =~ ^(--(name|zone|project|type|version|python|worker|env))=(.*)$ ]]; then
    set -- "${BASH_REMATCH[1]}" "${BASH_REMATCH[3]}" "${@:2}"
  fi
  case $1 in
    --env)
      [[ ${2:-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env needs NAME=VALUE; see ./run_tpu.sh --help."
      environment+=("$2")
      shift 2
      ;;
    --name | --zone | --project | --type | --version | --python | --worker)
      [ $# -ge 2 ] || fail "$1 needs a value; see ./run_tpu.sh --help."
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
[[ $action =~ ^(mount|run|copy)$ ]] || [ $# -eq 0 ] || fail "$action takes no arguments; only mount, run and copy do."
[ "$action" = run ] || [ ${#environment[@]} -eq 0 ] || fail "--env is for run, not for $action."
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

# Runs one shell command line on the workers; the caller quotes what is in it.
on_workers() {
  call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

# Its arguments as one line that a shell reads back as the same arguments.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

create() {
  local request=(gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}"
    --accelerator-type="$type" --runtime-version="$version")
  if $spot; then request+=(--spot); fi
  call "${request[@]}"
  local describe=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
  if $dry_run; then
    call "${describe[@]}"
    return
  fi
  local state=
  until [ "$state" = ACTIVE ]; do
    state=$("${describe[@]}")
    printf '%s  %s\n' "$(date +%T)" "$state" >&2
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) fail "the TPU $name is $state; delete it and create it anew." ;;
      *) sleep 20 ;;
    esac
  done
}

setup() {
  local archive here
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  archive=${TMPDIR:-/tmp}/mpt_jax_$$.tar.gz
  if ! $dry_run; then trap 'rm -f "$archive"' EXIT; fi
  call tar -czf "$archive" -C "$here" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ .
  call gcloud compute tpus tpu-vm scp "$archive" "$name:mpt_jax.tar.gz" "${place[@]}" --worker=all
  local check='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
  local wrong="error: mpt_jax needs Python 3.11, 3.12 or 3.13, which $python on the TPU VM is not; install one there and give it in --python."
  # The code is replaced; the environment and whatever runs left in the folder stay.
  on_workers all "[ -x mpt_jax/.venv/bin/python ] || $(quoted "$python") -c $(quoted "$check") || { echo $(quoted "$wrong") >&2; exit 2; }; mkdir -p mpt_jax && cd mpt_jax && rm -rf mpt_jax tasks gin tests && tar -xzf ../mpt_jax.tar.gz && \
    { [ -x .venv/bin/python ] || $(quoted "$python") -m venv .venv; } && .venv/bin/python -m pip install --quiet \
    -r requirements.txt \"\$(sed -n 's/^jax==\([0-9.]*\).*/jax[tpu]==\1/p' requirements.txt)\""
}

run() {
  [ $# -gt 0 ] || fail "run needs the arguments of mpt_jax after --, such as: run -- train --gin_file=…"
  local job
  job=$(quoted env ${environment[@]+"${environment[@]}"} .venv/bin/python -m mpt_jax "$@")
  # A second job on one TPU would wait for the first for ever, so it is refused.
  on_workers all "cd mpt_jax || exit 1; if [ -f ../mpt_jax.pid ] && kill -0 \"\$(cat ../mpt_jax.pid)\" 2>/dev/null; then \
    echo 'a job is running already; stop it first' >&2; exit 1; fi; \
    nohup setsid $job >../mpt_jax.log 2>&1 </dev/null & echo \$! >../mpt_jax.pid"
  if $dry_run; then return; fi
  printf 'started; follow it with: %s\n' "$(quoted "$0" --name "$name" --zone "$zone" logs)" >&2
}

mount_bucket() {
  [ $# -eq 2 ] || fail "mount needs BUCKET and FOLDER after --, such as: mount -- my-bucket bucket."
  local bucket=${1#gs://} folder=$2
  local absent="error: gcsfuse is not installed on the TPU VM; install it on every worker (https://cloud.google.com/storage/docs/cloud-storage-fuse/install)."
  # Caches and checkpoints are moved into place as whole folders, which gcsfuse refuses above a limit that is 0 unless it is set.
  on_workers all "command -v gcsfuse >/dev/null || { echo $(quoted "$absent") >&2; exit 2; }; cd mpt_jax && \
    mkdir -p $(quoted "$folder") && { mountpoint -q $(quoted "$folder") || \
    gcsfuse --implicit-dirs --rename-dir-limit=100000 $(quoted "$bucket" "$folder"); }"
}

copy() {
  [ $# -eq 2 ] || fail "copy needs FROM and TO after --, such as: copy -- runs/xl gs://BUCKET/runs/xl."
  on_workers 0 "cd mpt_jax && $(quoted gcloud storage rsync --recursive "$@")"
}

case $action in
  create) create ;;
  setup) setup ;;
  mount) mount_bucket "$@" ;;
  run) run "$@" ;;
  copy) copy "$@" ;;
  logs) on_workers "$worker" 'tail -n 200 -F mpt_jax.log' ;;
  stop) on_workers all "kill -TERM \"\$(cat mpt_jax.pid)\"" ;;
  delete) call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force ;;
  *) fail "there is no action $action; see ./run_tpu.sh --help." ;;
esac
