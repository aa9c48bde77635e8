# The machine's first program. All it needs to know is in the environment lines above it, and `fetcher` prints fetch.py.
# It fetches the bundle, checks it, starts the agent, and powers the machine off when the agent ends, however it ends.
set -eu -o pipefail

phase=boot python="" problem="" watchdog=""
work="${HOLDFAST_WORK:-${PWD%/}}/work"
# cloud-init sets none.
export HOME="${HOME:-/root}"

# Locally the machine ends with this process.
power_off() {
  if [ -n "${HOLDFAST_POWER_OFF:-}" ]; then $HOLDFAST_POWER_OFF; else shutdown -h now || poweroff -f; fi
}
note() { echo "$1 ${EPOCHREALTIME:-$(date +%s)}" >> boot.times; }
# No command where bash will do: on the local cloud a boot is on the way of every recovery.
say() { echo "$1" || true; echo "$1" >> boot.log; }
begin() { phase="$1"; say "holdfast: boot $phase $(date -u +%FT%TZ) $2"; }
finish() {
  status=$?
  # Whatever fails here, a full disk for one, the machine must end.
  set +e
  if [ "$phase" != over ]; then
    problem="boot failed in phase $phase: ${problem:-status $status, see the lines before}"
    say "holdfast: $problem"
    if [ -n "$python" ]; then "$python" -I -S fetch.py report "$problem" boot.log boot.times; fi
  fi
  if [ -n "$watchdog" ]; then kill "$watchdog"; fi
  power_off
}
# Snapshots of the training's state lie in shared memory, and a disk takes them sooner from huge pages. Most systems
# forbid those; from here on whoever asks for them gets them.
allow_huge_pages() {
  huge=/sys/kernel/mm/transparent_hugepage/shmem_enabled
  case "$(cat $huge)" in *"[never]"*) echo advise > $huge ;; esac
}
# The machine's own dead-man's switch, for clouds that have none and for a boot that hangs. It asks the agent first.
watch() {
  trap 'kill "$sleeper"; exit' TERM
  sleep "$1" & sleeper=$!; wait "$sleeper"
  echo "holdfast: $HOLDFAST_MAX_RUN_SECONDS s, the longest that this machine may run, are over" || true
  if kill -TERM "$(cat agent.pid)"; then sleep "$2" & sleeper=$!; wait "$sleeper"; fi
  power_off || true
  kill -KILL $$ "$(cat agent.pid)"  # in this order, or we might still say that it was killed
}

trap finish EXIT
# Google's runner stops reading for good after a line of 64 KiB, such as a progress bar's; that must not be our end.
trap '' PIPE
# An orderly shutdown is the agent's to handle; bash waits for it.
trap : TERM
mkdir -p "$work"
cd "$work"
# What a life before a reboot has left would be taken for this one's.
rm -f agent.pid boot.log boot.times telemetry.jsonl notice.json
note boot-started
begin boot "on $HOSTTYPE $OSTYPE"
# Not on a computer that only plays machines.
if [ -z "${HOLDFAST_POWER_OFF:-}" ]; then allow_huge_pages 2> /dev/null || true; fi
if [ -n "${HOLDFAST_MAX_RUN_SECONDS:-}" ]; then
  # The local cloud's clock may run faster than the wall's: "origin speed".
  clock="${HOLDFAST_CLOCK:-}" speed=1
  if [ -n "$clock" ]; then speed="${clock##* }"; fi
  read -r longest grace <<< "$(awk -v s="$HOLDFAST_MAX_RUN_SECONDS" -v k="$speed" 'BEGIN { print s / k, 60 / k }')"
  watch "$longest" "$grace" &
  watchdog=$!
fi
# The serial console outlives the machine: the last steps are read there.
if [ -z "${HOLDFAST_CONSOLE:-}" ] && [ -c /dev/console ] && { : > /dev/console; } 2> /dev/null; then
  export HOLDFAST_CONSOLE=/dev/console
fi
for candidate in ${HOLDFAST_PYTHON:+"$HOLDFAST_PYTHON"} \
  /opt/pytorch/bin/python3 /opt/conda/bin/python3 /opt/python/bin/python3 python3; do
  if command -v "$candidate" > /dev/null; then python="$candidate"; break; fi
  if [ "$candidate" = "${HOLDFAST_PYTHON:-}" ]; then break; fi
done
if [ -z "$python" ]; then
  problem="no ${HOLDFAST_PYTHON:-python3} on this machine; name one in environment.python"; exit 1
fi
export HOLDFAST_PYTHON="$python"

begin fetch "$HOLDFAST_BUNDLE with $python"
fetcher > fetch.py
{ problem=$("$python" -I -S fetch.py fetch "$HOLDFAST_BUNDLE" bundle.tar.gz "$HOLDFAST_BUNDLE_SHA256" 2>&1 >&3); } 3>&1
note bundle-fetched
begin unpack bundle.tar.gz
problem=$(tar -xzf bundle.tar.gz 2>&1)
rm bundle.tar.gz
begin agent "starting"
PYTHONPATH="$work/lib${PYTHONPATH:+:$PYTHONPATH}" "$python" -m holdfast.runtime "$work" || status=$?
# 1 is Python's own for what was never caught: the agent itself ends otherwise.
if [ "${status:-0}" = 1 ]; then problem="the agent did not start"; exit 1; fi
phase=over
