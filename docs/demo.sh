#!/bin/sh
# The whole job on one machine, without an account: a staging hub on loopback stands in for the
# public one, and a twin of MiniCPM-V 4.6 for the release.
set -eu

work="$PWD/.demo"
rm -rf "$work"
mkdir -p "$work"
export HF_HOME="$work/hf" HF_TOKEN=hf_staging HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TOKENIZERS_PARALLELISM=false
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
run() { say "$@"; "$@"; }

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export HF_ENDPOINT="http://127.0.0.1:$port"
say convert hub --dir "$work/hub" --port "$port"
convert hub --dir "$work/hub" --port "$port" >"$work/hub.log" 2>&1 &
hub=$!
trap 'kill $hub 2>/dev/null || true' EXIT INT TERM
python - <<'PY'
import os, time, urllib.request
for _ in range(300):
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/api/models").close()
        break
    except OSError:
        time.sleep(0.1)
else:
    raise SystemExit("the staging hub did not start; see .demo/hub.log")
PY

run convert twin minicpmv4_6 "$work/MiniCPM-V-4_6" --dtype bfloat16
run hf upload openbmb/MiniCPM-V-4_6 "$work/MiniCPM-V-4_6" . --quiet

cd "$work"
run convert --hf-path openbmb/MiniCPM-V-4_6 -q --q-bits 4 --upload-repo

python -c '
from PIL import Image, ImageDraw
picture = Image.new("RGB", (96, 64), "white")
ImageDraw.Draw(picture).ellipse((20, 10, 70, 54), fill="red")
picture.save("picture.png")'
run python -m mlx_vlm.generate --model local/MiniCPM-V-4_6-4bit --image picture.png \
    --prompt "What is in the picture?" --max-tokens 12 --temperature 0

printf '\nThe staged repos stay in %s; serve them again with:\n  convert hub --dir %s\n' "$work/hub" "$work/hub"
