# The machine's first program. Everything it needs to know is in the environment lines above it.
# It fetches the bundle, checks it, starts the agent, and powers the machine off when the agent ends, however it ends.
set -eu
power_off() { ${HOLDFAST_POWER_OFF:-shutdown -h now}; }
trap power_off EXIT
trap : TERM   # an orderly shutdown is the agent's to handle; bash waits for it

work="${HOLDFAST_WORK:-$PWD}/work"
mkdir -p "$work"
cd "$work"
echo "holdfast: boot $(date -u +%FT%TZ) fetching $HOLDFAST_BUNDLE"
case "$HOLDFAST_BUNDLE" in
  file://*)
    path="${HOLDFAST_BUNDLE#file://}"
    cp -- "$(printf '%b' "${path//%/\\x}")" bundle.tar.gz ;;
  *)
    echo "holdfast: boot failed: no way to fetch $HOLDFAST_BUNDLE"; exit 1 ;;
esac
if command -v sha256sum > /dev/null; then sum=$(sha256sum bundle.tar.gz); else sum=$(shasum -a 256 bundle.tar.gz); fi
if [ "${sum%% *}" != "$HOLDFAST_BUNDLE_SHA256" ]; then
  echo "holdfast: boot failed: the bundle's SHA-256 is ${sum%% *}, expected $HOLDFAST_BUNDLE_SHA256"; exit 1
fi
tar -xzf bundle.tar.gz
rm bundle.tar.gz
echo "holdfast: boot starting the agent"
PYTHONPATH="$work/lib${PYTHONPATH:+:$PYTHONPATH}" "${HOLDFAST_PYTHON:-python3}" -m holdfast.runtime "$work"
