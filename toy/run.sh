#!/usr/bin/env bash
# All six stages on a drawn world and a tiny Qwen2.5-VL: 15 to 40 minutes on 2 CPU cores.
#
#     bash toy/run.sh [folder]        (default: toy/work)
#
# A stage is skipped if its output exists; a killed stage resumes. The last line of stdout is one JSON object;
# report.html in the folder shows the same with the figures.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-toy/work}
mkdir -p "$work"

# stage NAME OUTPUT COMMAND...: run the command unless its output exists; its stdout goes to NAME.out. Exit 3,
# "complete with errors on some samples", is normal for a captioner this small.
stage() {
  local name=$1 output=$2 begun=$SECONDS status=0
  shift 2
  if [ -e "$output" ]; then echo "== $name: $output exists" >&2; return; fi
  echo "== $name" >&2
  "$@" > "$work/$name.out" || status=$?
  [ "$status" -eq 0 ] || [ "$status" -eq 3 ] || { echo "== $name failed with exit code $status" >&2; exit "$status"; }
  echo "== $name took $((SECONDS - begun)) s" >&2
}

world=$work/world
train="python train_sft.py --image_root $world --global_batch 64 --num_workers 0 --save_every 50 --keep 1"
lessons="$train --train_vision --warmup_steps 20 --learning_rate 3e-3"
probed="--options text --probe_items $world/probe.jsonl --crossed 10 10"
asked="--items $world/bench.jsonl --image_root $world --max_new_tokens 64 --batch_size 50 --dtype float32"
changed="--conditions full --options text --rows 400"
calls="--image_root $world --backend local --model $work/base --batch_size 50 --max_new_tokens 120 --no_guard"

# The world, and a base model that can see, find and read (in place of Qwen2.5-VL's pretraining)
stage world "$world/base.jsonl" python -m toy.make_world --output "$world"
stage random "$work/random/generation_config.json" python -m toy.make_model \
  --texts "$world/see.jsonl" "$world/find.jsonl" "$world/base.jsonl" --output "$work/random"
stage see "$work/see" $lessons --data "$world/see.jsonl" --model "$work/random" --output "$work/see" \
  --max_steps 170 --schedule constant
stage find "$work/find" $lessons --data "$world/find.jsonl" --model "$work/see" --output "$work/find" \
  --max_steps 170 --schedule constant
stage base "$work/base" $lessons --data "$world/base.jsonl" --model "$work/find" --output "$work/base" --max_steps 600

# Stages 1 and 2 with that base as captioner, refiner and judge
stage rewrite "$work/rewritten.jsonl" python rewrite_captions.py \
  --input "$world/Toy_zoom/train.json" "$world/Toy_draw/train.json" --output "$work/rewritten.jsonl" --prompts toy/prompts_rewrite.json $calls
stage filter "$work/sft.jsonl" python filter_data.py --input "$work/rewritten.jsonl" --output "$work/sft.jsonl" --prompts toy/prompts_filter.json \
  --calibrate "$world/truth.jsonl" $calls

# Stage 3: text and latent imagination from the same rows
for variant in text latent; do
  stage "train_$variant" "$work/$variant" $train --data "$work/sft.jsonl" --model "$work/base" --output "$work/$variant" \
    --imagination "$variant" --max_steps 200 --learning_rate 1e-3 --validation_rows 60 --eval_every 50
done

# Stage 4: base, text and latent on the held-out items; stages 5 and 6 on text and latent
for variant in base text; do
  stage "evaluate_$variant" "$work/evaluate_$variant.jsonl" \
    python evaluate.py --model "$work/$variant" $asked --protocol plain --output "$work/evaluate_$variant.jsonl"
done
stage evaluate_latent "$work/evaluate_latent.jsonl" \
  python evaluate.py --model "$work/latent" $asked --protocol plain --latent mirage --output "$work/evaluate_latent.jsonl"
stage intervene_text "$work/intervene_text.jsonl" \
  python intervene.py --model "$work/text" $asked $changed --output "$work/intervene_text.jsonl"
stage intervene_latent "$work/intervene_latent.jsonl" \
  python intervene.py --model "$work/latent" $asked $changed --latent mirage --output "$work/intervene_latent.jsonl"
stage probe_text "$work/probe_text/metrics.json" \
  python probe.py --model "$work/text" $asked $probed --output "$work/probe_text"
stage probe_latent "$work/probe_latent/metrics.json" \
  python probe.py --model "$work/latent" $asked $probed --latent mirage --output "$work/probe_latent"

python -m toy.report --work "$work" --seconds "$SECONDS"
