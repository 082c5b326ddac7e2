#!/bin/sh
# The figures and checks that want a GPU, by parts: sh benchmarks/gpu.sh OUT PART...
#
#   kernels    beside their peers, where these are importable        220 s    kernels.md
#   merged     launch shapes of the backward with few heads          120 s    kernels.md
#   layers     steps, decoding; whole layers and the crossover       300 s    kernels.md
#   learner    the learner's phase of a GRPO step                    180 s    ../docs/training.md
#   learn      dense -> convert -> warm-up -> sparse at 16k tokens   300 s    README.md
#   vllm       our plugin against vLLM's own model                   300 s    ../docs/vllm.md
#   sync       weights to an engine of another process               120 s    ../docs/vllm.md
#   trl        a step against TRL's                                  580 s    README.md
#   checks     no times, so all at once: tests at real sizes, killed and resumed runs, log-prob gaps, batches of
#              1 to 65 in deterministic mode                         560 s
#   ranks      tests that want two GPUs                              300 s
#
# Each part ends at its limit. OUT/PART.txt has what it printed, OUT/PART.json its figures. The packages must be importable.
set -u
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 VLLM_USE_FLASHINFER_SAMPLER=0

run() { # NAME SECONDS COMMAND...
    name=$1 seconds=$2
    shift 2
    timeout "$seconds" "$@" >"$out/$name.txt" 2>&1
    echo "== $name: exit code $?"
    grep -viE 'warn|^INFO|^WARNING' "$out/$name.txt" | tail -n 40 | cut -c1-180
}

rollouts() { # NAME SECONDS ARGUMENTS...
    name=$1 seconds=$2
    shift 2
    run "$name" "$seconds" python benchmarks/vllm_rollouts.py --out "$out/$name.json" "$@"
}

for part; do
    case $part in
    kernels)
        run kernels 160 python benchmarks/kernels.py --kinds loc --json "$out/kernels.json"
        run topk-128k 60 python benchmarks/kernels.py topk --keys 131072 --kinds loc --json "$out/topk-128k.json"
        ;;
    merged) run merged 120 python benchmarks/merged_shapes.py --heads 16 --out "$out/merged.json" ;;
    layers)
        run decode 40 python benchmarks/kernel_layers.py decode --out "$out/decode.json"
        run step 90 python benchmarks/kernel_layers.py step --out "$out/step.json"
        run hf 90 python benchmarks/kernel_layers.py hf --out "$out/hf.json"
        run dense 80 python benchmarks/kernel_layers.py dense --out "$out/dense.json"
        ;;
    learner) run learner 180 python benchmarks/learner_gpu.py --out "$out/learner.json" --steps 2 --profile \
        --cases "short;short, indexer frozen;long" ;;
    learn) run learn 300 python benchmarks/learn_long.py --out "$out/learn.json" ;;
    vllm) rollouts vllm 300 ;;
    sync) run sync 120 python benchmarks/weight_sync.py --out "$out/sync.json" ;;
    trl) run trl 580 python benchmarks/vs_trl.py --size gpu --trl-python python --sides ours trl --timeout 280 \
        --json "$out/trl.json" ;;
    checks)
        run tests 540 python -m pytest -q -p no:cacheprovider tests/gpu tests/test_rope.py tests/test_copies.py \
            tests/test_training_kernels.py --ignore tests/gpu/test_ranks.py &
        run kills 550 python benchmarks/resume_kills.py --out "$out/kills.json" &
        rollouts gaps 540 --gaps --deterministic --sizes 4x4096 2x32768 --new 64 --memory 0.25 &
        rollouts bits 540 --deterministic --sides ours --sizes 8x4096 --new 64 --memory 0.25 &
        wait
        ;;
    ranks) run ranks 300 python -m pytest -q -p no:cacheprovider tests/gpu/test_ranks.py tests/gpu/test_offload.py ;;
    *)
        echo "error: no part is called $part; the head of $0 lists them" >&2
        exit 2
        ;;
    esac
done
