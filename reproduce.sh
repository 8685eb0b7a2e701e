#!/usr/bin/env bash
# The reference run: every stage and table of the paper, on one node of 8 GPUs with 80 GB each. Not run yet:
# minutes (8 A800, 40 % of their peak in training, vLLM at 60 requests/s) and disk are estimates.
#
#     bash reproduce.sh --dry_run [folder]     checks all flags; prints every command, GPUs, disk, hours
#     bash reproduce.sh [folder]               (default: reproduction) runs; the last line is the report's path
#
# A stage whose output exists is skipped, and a killed stage resumes: run the same command again. A comment
# after a stage shows how the last line of its stdout (<folder>/logs/NAME.out) begins. Models and data have
# their authors' names on the hub; set another copy or a local folder by MONET=/models/monet bash reproduce.sh.
set -euo pipefail
cd "$(dirname "$0")"
dry=
if [ "${1:-}" = --dry_run ]; then dry=1; shift; fi
work=${1:-reproduction}
# models 190, checkpoints of six finished trainings 108 and of one running 190, data 120, items 30, journals, spare
n_gpus=8 gib_needed=770
BASE=${BASE:-Qwen/Qwen2.5-VL-7B-Instruct}
CAPTIONER=${CAPTIONER:-Qwen/Qwen3-VL-4B-Instruct}
EDITOR_LLM=${EDITOR_LLM:-Qwen/Qwen3-32B} # edits imaginations, and maps an unclear reply to an option
MONET=${MONET:-NOVAglow646/Monet-7B}
LVR=${LVR:-vincentleebang/LVR-7B}
DEEPEYES=${DEEPEYES:-ChenShawn/DeepEyes-7B}
RELEASED=${RELEASED:-Michael4933/CapImagine-7B}
DATA=${DATA:-NOVAglow646/Monet-SFT-125K}
MIRAGE=${MIRAGE:-} MIRAGE_VSP=${MIRAGE_VSP:-} # a checkpoint and test.jsonl of Mirage; without them no such rows
data=$work/data bench=$work/bench minutes=0 server='' planned=() table=()
declare -A cost=([vstar]=6 [hr4k]=20 [hr8k]=30 [realworld]=45 [Jigsaw]=5 [Multi-view_Reasoning]=5 [vwtq]=15
  [vwtq_syn]=5 [vtabfact]=5 [vsp]=10)

die() { echo "reproduce.sh: $*" >&2; exit 2; }

# stage NAME MINUTES OUTPUT COMMAND...: run the command unless OUTPUT exists. Exit 3: complete with sample errors.
stage() {
  local name=$1 expected=$2 output=$3 begun=$SECONDS status=0
  shift 3
  minutes=$((minutes + expected))
  if [ -n "$dry" ]; then printf -v line '%q ' "$@"; planned+=("$output" "$line"); echo "$line"; return; fi
  if [ -e "$output" ]; then echo "== $name: $output exists" >&2; return; fi
  echo "== $name, about $expected minutes" >&2
  "$@" > "$work/logs/$name.out" || status=$?
  [ "$status" -eq 0 ] || [ "$status" -eq 3 ] || die "$name failed with exit code $status; see $work/logs/$name.out"
  echo "== $name took $(((SECONDS - begun) / 60)) min: $(tail -n 1 "$work/logs/$name.out" | cut -c 1-200)" >&2
}

# serve PORT UNTIL MODEL FLAGS...: start a vLLM server, unless the file UNTIL exists, and wait for it.
serve() {
  local port=$1 until=$2 tries=0
  shift 2
  if [ -n "$dry" ]; then printf '%q ' "$work/vllm/bin/vllm" serve "$@" --port "$port"; echo; return; fi
  [ ! -e "$until" ] || return 0
  "$work/vllm/bin/vllm" serve "$@" --port "$port" > "$work/logs/server-$port.log" 2>&1 &
  server=$!
  until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/v1/models"; do
    kill -0 "$server" 2> /dev/null || die "the server of $1 ended; see $work/logs/server-$port.log"
    tries=$((tries + 1))
    [ "$tries" -lt 180 ] || die "the server of $1 does not answer after 30 minutes; see $work/logs/server-$port.log"
    sleep 10
  done
}
stop_server() {
  if [ -n "$server" ]; then kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; fi
  server=''
}
trap stop_server EXIT
unpack() {
  local zip
  for zip in "$data"/monet/*/images.zip; do unzip -qn "$zip" -d "${zip%/*}"; done
  touch "$data/unpacked"
}
export -f unpack
export data

found=0
if command -v nvidia-smi > /dev/null; then found=$(nvidia-smi -L | wc -l); fi
free=$(df -Pk "$(dirname "$work")" | awk 'NR == 2 {print int($4 / 1048576)}')
if [ -z "$dry" ]; then
  [ "$found" -ge "$n_gpus" ] ||
    die "$found GPUs found (nvidia-smi), expected $n_gpus; --dry_run shows the commands, toy/run.sh runs on a CPU"
  [ "$free" -ge "$gib_needed" ] || [ -d "$work" ] || die "$free GiB free for $work, expected $gib_needed"
  for tool in hf unzip curl torchrun; do
    command -v "$tool" > /dev/null || die "no $tool; pip install -r requirements.txt, apt install unzip curl"
  done
  mkdir -p "$work/logs" "$bench"
fi
many=(torchrun --standalone --nproc_per_node "$n_gpus")

# Data, and a separate environment for the server
stage venv 10 "$work/vllm/bin/vllm" bash -c "python -m venv '$work/vllm' && '$work/vllm/bin/pip' install vllm"
stage data 60 "$data/monet" hf download "$DATA" --repo-type dataset --local-dir "$data/monet"
stage unpack 20 "$data/unpacked" bash -c unpack
stage blink 5 "$data/blink" hf download BLINK-Benchmark/BLINK --repo-type dataset --local-dir "$data/blink"
stage tablevqa 2 "$data/tablevqa" hf download terryoo/TableVQA-Bench --repo-type dataset --local-dir "$data/tablevqa"

# Stages 1 and 2: captions for 125,000 chains, of which about 17,000 are kept
serve 8000 "$work/sft.jsonl" "$CAPTIONER" --data-parallel-size $n_gpus --max-model-len 8192 --generation-config vllm \
  --limit-mm-per-prompt '{"image": 4, "video": 0}' --mm-processor-kwargs '{"size": {"shortest_edge": 65536, "longest_edge": 1003520}}'
calls=(--image_root "$data/monet" --model "$CAPTIONER" --backend openai --base_url http://127.0.0.1:8000/v1 --concurrency 256)
m=$data/monet
stage rewrite 90 "$work/rewritten.jsonl" python rewrite_captions.py --input "$m/Visual_CoT/train.json" "$m/ReFocus/train.json" \
  "$m/CogCoM/train.json" "$m/Zebra_CoT_count/train.json" "$m/Zebra_CoT_visual_search/train.json" "$m/Zebra_CoT_geometry/train.json" \
  "${calls[@]}" --output "$work/rewritten.jsonl"   # {"read": 125072, "kept":
stage filter 45 "$work/sft.jsonl" python filter_data.py --input "$work/rewritten.jsonl" "${calls[@]}" --output "$work/sft.jsonl"   # {"read":
stop_server

# Stage 3: the text model, its ablations, and the other targets, from the same rows
train() {  # train NAME MINUTES ROWS IMAGINATION FLAGS...
  stage "train_$1" "$2" "$work/$1" "${many[@]}" train_sft.py --data "$work/$3.jsonl" --image_root "$data/monet" --model "$BASE" \
    --output "$work/$1" --imagination "$4" --validation_rows 200 "${@:5}"   # {"imagination": "text", "rows":
}
train text 150 sft text
train placeholder 140 sft placeholder
train unfiltered 950 rewritten text
train latent 300 sft latent
# Mirage's second stage: from the first one's checkpoint, latents learn through the answer alone
train latent2 300 sft latent --model "$work/latent" --align_weight 0
train direct 120 sft direct

# Stage 4: prepare items once, then every model; a judge maps unclear replies to options without the answer
prepare() {  # prepare NAME MINUTES BENCHMARK [--source FOLDER]
  stage "prepare_$1" "$2" "$bench/$1.items.jsonl" python evaluate.py --prepare --output "$bench/$1" --benchmark "${@:3}"   # {"items": 191
}
prepare vstar 2 vstar
prepare hr4k 5 hrbench_4k
prepare hr8k 15 hrbench_8k
prepare realworld 10 mme_realworld_lite
for task in Jigsaw Multi-view_Reasoning; do prepare "$task" 1 "blink/$task" --source "$data/blink"; done
for split in vwtq vwtq_syn vtabfact; do prepare "$split" 1 "tablevqa/$split" --source "$data/tablevqa"; done
main="vstar hr4k hr8k" all="vstar hr4k hr8k realworld Jigsaw Multi-view_Reasoning vwtq vwtq_syn vtabfact"
judge=(--judge map --judge_model "$EDITOR_LLM" --judge_base_url http://127.0.0.1:8001/v1)
evaluate() {  # evaluate NAME ROW MODEL BENCHMARKS FLAGS...
  local one
  for one in $4; do
    stage "evaluate_$1_$one" "${cost[$one]}" "$work/results/$1.$one.jsonl" "${many[@]}" evaluate.py \
      --items "$bench/$one.items.jsonl" --model "$3" "${judge[@]}" --output "$work/results/$1.$one.jsonl" \
      "${@:5}"   # {"n": 191, "correct":
    table+=("$2=$work/results/$1.$one.jsonl")
  done
}
serve 8001 "$work/interventions_done" "$EDITOR_LLM" --tensor-parallel-size $n_gpus --gpu-memory-utilization 0.25 --max-model-len 16384
evaluate base Qwen2.5-VL-7B "$BASE" "$all"
evaluate text CapImagine "$work/text" "$all" --method text --protocol monet
evaluate released CapImagine-released "$RELEASED" "$all" --method text --protocol monet
evaluate monet Monet "$MONET" "$all" --latent monet_vllm --protocol monet
evaluate lvr LVR "$LVR" "vstar hr4k hr8k realworld Jigsaw Multi-view_Reasoning" --latent lvr
for name in placeholder unfiltered; do evaluate "$name" "$name" "$work/$name" "$main" --method text --protocol monet; done
evaluate direct direct "$work/direct" "$main"
for name in latent latent2; do evaluate "$name" "$name" "$work/$name" "$main" --latent mirage --protocol monet; done
evaluate deepeyes DeepEyes "$DEEPEYES" "vstar hr4k hr8k realworld" --method tool
if [ -n "$MIRAGE" ]; then
  prepare vsp 1 vsp --source "$MIRAGE_VSP"
  evaluate mirage Mirage "$MIRAGE" vsp --latent mirage --protocol plain
fi

# Stage 5: do(Z) on latents and on text; stage 6: similarity and probing
intervene() {  # intervene NAME MODEL FLAGS...
  local one
  for one in ${tasks:-vstar hr4k}; do
    stage "intervene_$1_$one" 90 "$work/interventions/$1.$one.jsonl" "${many[@]}" intervene.py --items "$bench/$one.items.jsonl" \
      --model "$2" --output "$work/interventions/$1.$one.jsonl" --conditions full "${@:3}"   # {"stage": "intervene",
  done
}
five=("$bench"/{vstar,mme,ocrbench,realworld,vwtq}.items.jsonl)
probe() {  # probe NAME MODEL FLAGS...: 20 instances of each of five benchmarks, then questions answered without the image
  stage "probe_$1" 20 "$work/probes/$1/metrics.json" python probe.py --items "${five[@]}" --model "$2" --n_items 100 --edits all \
    --crossed 10 10 --output "$work/probes/$1" "${@:3}"   # {"stage": "probe",
  stage "ask_$1" 20 "$work/probes/$1.vstar/metrics.json" python probe.py --items "$bench/vstar.items.jsonl" --model "$2" --circular \
    --probe_items "$work/vstar_probe.jsonl" --variants tokens_only cut --output "$work/probes/$1.vstar" "${@:3}"   # {"stage": "probe",
}
intervene monet "$MONET" --latent monet_capimagine
intervene lvr "$LVR" --latent lvr
intervene latent "$work/latent" --latent mirage
intervene text "$work/text" directed_llm --editor_model "$EDITOR_LLM" --editor_url http://127.0.0.1:8001/v1
if [ -n "$MIRAGE" ]; then tasks=vsp intervene mirage "$MIRAGE" --latent mirage --suffix ""; fi
stage interventions_done 0 "$work/interventions_done" touch "$work/interventions_done"
stop_server
prepare mme 2 mme
prepare ocrbench 10 ocrbench_v2
stage derive 15 "$work/vstar_probe.jsonl" "${many[@]}" probe.py derive --items "$bench/vstar.items.jsonl" --image_root "$bench" \
  --model "$CAPTIONER" --questions 3 --output "$work/vstar_probe.jsonl"   # {"sources": 191, "asked": 573,
probe monet "$MONET" --latent monet_capimagine
probe lvr "$LVR" --latent lvr
probe latent "$work/latent" --latent mirage
probe text "$work/text"

# Tables and report
stage compare 1 "$work/compare.json" python evaluate.py --output "$work/compare.json" --compare \
  "$work/results/base.vstar.jsonl" "$work/results/text.vstar.jsonl" "$work/results/monet.vstar.jsonl" "$work/results/text.vstar.jsonl"
stage table 1 "$work/table.md" python evaluate.py --output "$work/table.md" --table "${table[@]}"   # {"results":
stage report 2 "$work/report.html" python probe.py report "$work"

if [ -z "$dry" ]; then echo "$work/report.html"; exit; fi
# Check flags by each script's own parser, and that paths in the folder exist or are made by an earlier stage.
printf '%s\n' "${planned[@]}" | python -c '
import importlib, pathlib, shlex, sys
lines, made = sys.stdin.read().splitlines(), []
for output, words in zip(lines[::2], map(shlex.split, lines[1::2])):
    place = next((n + 1 for n, word in enumerate(words) if word.endswith(".py")), None)
    if place:
        args = importlib.import_module(words[place - 1][:-3]).parse_args(words[place:])
        for name in ("input", "data", "items", "source", "model", "image_root", "compare", "table"):
            value = getattr(args, name, None) or []
            for path in [value] if isinstance(value, str) else value:
                path = path.split("=")[-1]
                pairs = [pair for output in made for pair in ((path, output), (output, path))]
                known = any(f"{inner}/".startswith(f"{outer}/") for inner, outer in pairs)
                if path.startswith(sys.argv[1] + "/") and not known and not pathlib.Path(path).exists():
                    sys.exit(f"reproduce.sh: --{name} {path}: no stage before makes it")
    made.append(output)
' "$work"
echo "GPUs $found of $n_gpus | free $free of $gib_needed GiB in $(dirname "$work")" \
  "| estimated $((minutes / 60)) h $((minutes % 60)) min" >&2
