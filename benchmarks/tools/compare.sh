#!/bin/sh
# The whole comparison with other tools, one thing after the other: sh compare.sh VENVS FOLDER [SECONDS]
#
# VENVS holds the tools' virtual environments (make_venvs.sh), FOLDER takes all that is made, SECONDS is each tool's
# budget. Run it in the environment of autocompress, with nothing beside.
set -eu
mkdir -p "$2"
venvs=$1 folder=$(cd "$2" && pwd) seconds=${3:-600}
here=$(dirname "$0")
export XDG_CACHE_HOME="$folder/cache" # a bank of its own, empty at first
results=""
for runtime in openvino onnxruntime; do
  for space in encoder-joint encoder-bits; do
    to=$folder/$runtime-$space
    # One that is finished would tell the time of finding that out.
    [ -e "$to/timing.json" ] || autocompress search demo --target "$runtime" --out "$to" --set search.trials=240 \
      --set "space=$space"
    results="$results --results $to"
  done
done
python "$here/prepare.py" demo --out "$folder/prepared"
for tool in nncf ort olive; do
  "$venvs/$tool/bin/python" "$here/${tool}_points.py" "$folder/prepared" --out "$folder/$tool" --seconds "$seconds"
done
python "$here/measure_points.py" "$folder/prepared" "$folder/nncf" "$folder/ort" "$folder/olive" --to "$folder/points.json"
# shellcheck disable=SC2086  # folders without spaces, one word each
python "$here/../against_tools.py" --points "$folder/points.json" $results
