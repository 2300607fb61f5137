#!/usr/bin/env bash
# Try the wheel and the source archive in empty environments: with torch alone, then the wheel with its extras.
#   tools/smoke.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} root=$PWD
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export PIP_CONSTRAINT=$root/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1

for file in "$root"/dist/*.whl "$root"/dist/*.tar.gz; do
    echo "$(basename "$file"), with torch alone"
    "$python" -m venv --clear "$place/env"
    "$place/env/bin/pip" install --quiet torch  # the version in the constraints
    PIP_CONSTRAINT='' "$place/env/bin/pip" install --quiet --no-deps "$file"
    cd "$place"
    env/bin/python -I -W error -W 'ignore:Failed to initialize NumPy' "$root/tools/smoke.py"
    env/bin/diffstride --version
    status=0
    printed=$(PYTHONWARNINGS=ignore env/bin/diffstride demo 2>&1) || status=$?
    [[ $status == 2 && $printed == *"pip install 'diffstride[train]'"* && $printed != *$'\n'* ]] || { echo "$printed"; exit 1; }
    cd "$root"
done

wheel=$(echo "$root"/dist/*.whl)
echo "$(basename "$wheel"), with its extras"
"$python" -m venv --clear "$place/env"
"$place/env/bin/pip" install --quiet torch
"$place/env/bin/pip" install --quiet "$wheel[train,export]"
cd "$place"
env/bin/diffstride fit --data PlantedBands --data.train_samples 256 --data.test_samples 64 --model.network TinyCNN \
    --trainer.max_steps 6 --trainer.accelerator cpu --trainer.enable_progress_bar false --name smoke
env/bin/diffstride export runs/smoke smoke.onnx --repeats 2
env/bin/diffstride export runs/smoke smoke.safetensors
cat > study.yaml <<END
base: runs/smoke/config.yaml
axes: {seed: [0]}
END
env/bin/diffstride study study.yaml --processes 1
env/bin/diffstride report runs/study
ls runs/study/report.html
echo "smoke: all done"
