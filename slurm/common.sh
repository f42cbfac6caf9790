# Sourced by the scripts here. Gives nproc, launch (what starts so many processes), key_of, out_dir_of and run.
# Exit codes: 0 done, 75 stopped before the end (the same command goes on), else the program's own.
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:--1}"  # see runtime/world.py
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"  # torchrun lets us save
[ ! -d .venv/bin ] || export PATH="$PWD/.venv/bin:$PATH"
pid="" signal="" restarts="${SLURM_RESTART_COUNT:-0}"
job="${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID:-}_}${SLURM_ARRAY_TASK_ID:-${SLURM_JOB_ID:-}}"
[ "${SLURM_TASK_PID:-}" = $$ ] || job=""  # no batch job: an interactive allocation cannot be requeued
for arg; do shift; [[ "$restarts" != 0 && "$arg" =~ ^--force(=|$) ]] || set -- "$@" "$arg"; done  # a requeued run is kept
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then gpus="$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^ *([0-9]|GPU|MIG)' || true)"
else gpus="${SLURM_GPUS_ON_NODE:-$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)}"; fi
nproc="${NPROC:-$gpus}" launch=(python)
if [ "$nproc" -le 1 ]; then nproc=1
else launch=(torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node="$nproc" --max_restarts=0); fi
key_of() {  # KEY DEFAULT "$@": config files first, then flags, as configurator.load does
  python -c 'import sys, configurator as c
args = sorted(sys.argv[3:], key=lambda a: a.startswith("--"))
settings = [s for a in args for s in ([c.read_flag(a)] if a.startswith("--") else c.read_file(a))]
print({key: value for key, value, _ in settings}.get(sys.argv[1], sys.argv[2]))' "$@" 2>/dev/null | tail -n 1 || echo "$2"
}; out_dir_of() { key_of out_dir "$@"; }
state() { grep -o '"state": "[a-z]*"' "$out_dir/state.json" 2>/dev/null | cut -d '"' -f 4 || true; }
check_progress() {  # restarts that bring no new checkpoint or result must not burn the allocation
  local now before="" times=0; mkdir -p "$out_dir"
  now="$(find "$out_dir" \( -name 'ckpt_*.pt' -o -name '*.jsonl' ! -name metrics.jsonl \) -printf '%P %s\n' | sort | cksum)"
  [ ! -f "$out_dir/.requeued" ] || read -r times before <"$out_dir/.requeued" || true
  if [ "$restarts" = 0 ] || [ "$now" != "$before" ]; then times=0; else times=$((times + 1)); fi
  echo "$times $now" >"$out_dir/.requeued"
  if [ "$times" -ge 3 ]; then echo "slurm: stopped: $times restarts without progress in $out_dir" >&2; exit 1; fi
}
stop() {  # SIGNAL: the first one goes to the program, as SIGTERM (USR1 kills torchrun); a second would end it without saving
  if [ "$1" = TERM ] && [ -n "$job" ]; then signal=TERM; return 0; fi  # from Slurm, to all processes
  if [ -n "$pid" ] && [ -z "$signal" ]; then echo "slurm: $1: asking the program to save"; kill -TERM "$pid" || true; fi
  if [ "$signal" != TERM ]; then signal="$1"; fi
}
listen() {  # by default Slurm tells of a preemption job steps only, by SIGTERM: this step hears it and tells the batch shell
  srun --overlap --ntasks=1 sh -c 'trap "exit 99" TERM; sleep infinity & wait' >/dev/null 2>&1 || heard=$?
  sleep 2  # if Slurm ends the whole job, it has ended this process by now
  if [ "${heard:-0}" = 99 ]; then kill -USR1 $$ 2>/dev/null || true; fi
}
run() {  # COMMAND...: let it save when it is to stop, requeue the job until it is done
  local rc=0 old new=none; old="$(cat "$out_dir/state.json" 2>/dev/null || true)"
  if [ -n "$job" ]; then check_progress; listen & fi
  echo "slurm: $* ($nproc processes, ${job:+job $job, restart $restarts, }$(hostname))"; rm -f "$out_dir/DONE"
  [ -n "$job" ] || set -m  # a process group of its own: Ctrl-C is for this shell alone
  "$@" & pid=$!; set +m; [ -z "$signal" ] || kill -TERM "$pid" || true
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done  # a trap ends a wait early
  wait "$pid" || rc=$?
  if [ "$rc" = 0 ]; then [ "$(state)" != done ] || touch "$out_dir/DONE"; return 0; fi
  [ "$old" = "$(cat "$out_dir/state.json" 2>/dev/null || true)" ] || new="$(state)"  # written by this start?
  case "$rc $new $signal" in  # torchrun's exit code is always 1; a program that was not in its loop dies of the signal
    75\ * | *\ preempted\ * | *\ none\ USR1 | *\ running\ USR1) ;;
    *) echo "slurm: failed, exit code $rc" >&2; return "$rc" ;;
  esac
  if [ -z "$job" ] || [ "$signal" = TERM ]; then echo "slurm: stopped before the end; the same command goes on"
  else scontrol requeue "$job" && echo "slurm: requeued" || echo "slurm: cannot requeue; submit the same command again" >&2; fi
  return 75
}
for name in USR1 TERM INT; do trap "stop $name" "$name"; done
