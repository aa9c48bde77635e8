#!/usr/bin/env bash
# A program that knows nothing of Holdfast and needs no Python: it sums the numbers up to a limit, and checkpoints by
# writing a folder and renaming it when it is complete. Runs as it is, and on spot machines (examples/counting.yaml).
set -eu
limit=${1:-40}
folder=${HOLDFAST_CHECKPOINT_DIRECTORY:-$(mktemp -d)}
step=${HOLDFAST_RESUME_STEP:-0}
sum=0
if [ -n "${HOLDFAST_RESUME_DIRECTORY:-}" ]; then
  sum=$(cat "$HOLDFAST_RESUME_DIRECTORY/sum")
  echo "resumed after $step with $sum"
fi
while [ "$step" -lt "$limit" ]; do
  step=$((step + 1))
  sum=$((sum + step))
  sleep 0.1
  mkdir -p "$folder/$step.tmp"
  echo "$sum" > "$folder/$step.tmp/sum"
  mv "$folder/$step.tmp" "$folder/$step"   # the rename says: complete
done
echo "the numbers up to $limit add up to $sum"
