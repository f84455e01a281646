#!/bin/sh
# Make one virtual environment per tool under the folder given as argument: sh make_venvs.sh FOLDER [PYTHON]
# Tested with Python 3.11 on Linux x86-64. torch goes first: where the index offers torch with CUDA, add the CPU index
# of PyTorch with PIP_EXTRA_INDEX_URL.
set -eu
folder=${1:?usage: make_venvs.sh FOLDER [PYTHON]}
python=${2:-python3}
common="transformers==5.23.0 tokenizers==0.23.3 numpy==2.4.6"
onnx="onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.31.1"

make() {
    name=$1
    shift
    "$python" -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet torch==2.13.0
    # shellcheck disable=SC2086
    "$folder/$name/bin/pip" install --quiet $common "$@"
}

mkdir -p "$folder"
# shellcheck disable=SC2086
{
    make nncf nncf==3.4.0 openvino==2026.4.1
    make ort $onnx
    # requests: olive-ai 0.13.0 imports it without naming it.
    make olive $onnx olive-ai==0.13.0 onnxscript==0.7.2 optuna==5.0.0 torchmetrics==1.9.0 requests==2.34.2 \
        tabulate==0.10.0 psutil==7.2.2
}
