#!/usr/bin/env bash
# Makes the mask and the recovery of sparse-llama, as they ship in maskpro_serve/assets: 25 minutes for the chats, 20 for
# the mask, 75 for the recovery, on two AVX2 cores; then, on two slow cores with AMX, which compute in bfloat16, 30 for more
# chats, 55 for the second distillation, 11 for chats that a server writes and 90 for the third; then, on two cores of Zen
# 5, 13 for more chats and 74 for the fourth.
#   learner/recipes/sparse_llama.sh DENSE C4.txt C4.jsonl FOLDER
# DENSE is the folder that `maskpro-serve --model dense-llama` builds in its cache; FOLDER gets everything made here.
set -euo pipefail
dense=$1 c4=$2 c4_more=$3 folder=$4
mkdir -p "$folder"
# glibc gives freed activations back to the kernel and faults them in again every step; kept, a step is a third faster.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000

# The model's own answers, in its chat format; the result is in the repository as sparse_llama_chat.jsonl.
chat=$folder/chat.jsonl
python -m maskpro_learner.chat_corpus --model "$dense" --prompts 1408 --max-new-tokens 96 --seed 1 --output "$chat"

# A one-shot mask to start from. The search is a long row of small products: one thread is fastest.
OMP_NUM_THREADS=1 maskpro-learn --model "$dense" --pattern 2:4 --init swap --calibration "$c4" "$chat" \
  --samples 64 --length 256 --batch 8 --encoding states --output "$folder/swap.safetensors"

maskpro-learn --model "$dense" --pattern 2:4 --init "$folder/swap.safetensors" \
  --calibration "$c4" "$c4_more" "$chat" --samples 390 --length 256 --steps 130 \
  --estimator first-order --start margin --initial-logit 3 --learning-rate 0.5 --draws 4 --minibatch 3 --batch 3 \
  --encoding states --output "$folder/mask.safetensors"

# The recovery: each block fitted to the dense one's output, then all of it distilled from the dense model.
maskpro-recover --model "$dense" --mask "$folder/mask.safetensors" --calibration "$c4" "$c4_more" "$chat" \
  --samples 72 --length 256 --rank 35 --block-steps 48 --steps 0 --output "$folder/blocks.safetensors"

maskpro-recover --model "$dense" --mask "$folder/mask.safetensors" --start "$folder/blocks.safetensors" \
  --calibration "$c4" "$c4_more" "$chat" "$chat" --distill-samples 560 740 190 190 --length 256 \
  --rank 35 --steps 420 --minibatch 4 --learning-rate 0.012 --output "$folder/distilled.safetensors"

# More chats, sampled: other answers to all the prompts there are, and prompts that the model writes itself. Cut off
# answers do no harm in distillation.
more=$folder/chat_more.jsonl own=$folder/chat_own.jsonl
python -m maskpro_learner.chat_corpus --model "$dense" --prompts 1886 --batch 128 --max-new-tokens 96 \
  --temperature 0.8 --keep-unfinished --dtype bfloat16 --seed 2 --output "$more"
python -m maskpro_learner.chat_corpus --model "$dense" --own-prompts --prompts 1536 --batch 128 --max-new-tokens 96 \
  --prompt-temperature 0.8 --temperature 0.8 --keep-unfinished --dtype bfloat16 --seed 3 --output "$own"

# Once more over all of it, with minibatches four times as large.
maskpro-recover --model "$dense" --mask "$folder/mask.safetensors" --start "$folder/distilled.safetensors" \
  --calibration "$c4" "$c4_more" "$chat" "$chat" "$more" "$more" "$own" \
  --distill-samples 700 758 170 170 540 540 450 --length 256 --seed 1 --dtype bfloat16 --rank 35 --steps 208 \
  --minibatch 16 --batch 16 --learning-rate 0.01 --output "$folder/distilled_twice.safetensors"

# From here on a server of the model $1 writes the chats, four times as fast.
serve() {
  maskpro-serve --model "$1" --port 8100 --max-num-seqs 128 --max-model-len 512 &
  server=$!
  trap 'kill $server' EXIT
  until curl --silent --fail http://localhost:8100/ready > /dev/null; do
    kill -0 $server  # or it has ended, and so does this
    sleep 1
  done
}
stop_serving() {
  kill $server
  wait $server
  trap - EXIT
}
write_chats() {
  python -m maskpro_learner.chat_corpus --model "$dense" --server http://localhost:8100/v1 --batch 512 \
    --max-new-tokens 96 --temperature 0.8 --keep-unfinished "$@"
}
sampled=$folder/chat_sampled.jsonl own_prompts=$folder/chat_own_prompts.jsonl
own_anew=$folder/chat_own_anew.jsonl short=$folder/short.jsonl short_sampled=$folder/short_sampled.jsonl
serve "$dense"
write_chats --prompts 1886 --seed 2 --output "$sampled"
write_chats --own-prompts --prompts 3600 --prompt-temperature 0.8 --seed 3 --output "$own_prompts"
write_chats --own-prompts --prompts 2000 --prompt-temperature 0.8 --seed 5 --output "$own_anew"
write_chats --short-questions --prompts 3800 --temperature 0 --seed 6 --output "$short"
write_chats --short-questions --prompts 3800 --seed 7 --output "$short_sampled"
stop_serving

# A third time, over more text and for longer.
maskpro-recover --model "$dense" --mask "$folder/mask.safetensors" --start "$folder/distilled_twice.safetensors" \
  --calibration "$c4" "$c4_more" "$chat" "$sampled" "$own_prompts" \
  --distill-samples 1100 1400 250 650 1500 --length 256 --seed 2 --dtype bfloat16 --steps 480 \
  --minibatch 16 --batch 16 --learning-rate 0.01 --output "$folder/distilled_thrice.safetensors"

# What the sparse model itself says to short questions, wrong as it may be: the dense model then shows it, token by
# token, where it would have gone on otherwise (on-policy distillation, arXiv:2306.13649).
maskpro-pack --model "$dense" --mask "$folder/mask.safetensors" --recovery "$folder/distilled_thrice.safetensors" \
  --output "$folder/sparse"
short_by_sparse=$folder/short_by_sparse.jsonl
serve "$folder/sparse"
write_chats --short-questions --prompts 3800 --seed 8 --output "$short_by_sparse"
stop_serving

# A fourth time, most of it on short questions, with smaller minibatches.
maskpro-recover --model "$dense" --mask "$folder/mask.safetensors" --start "$folder/distilled_thrice.safetensors" \
  --calibration "$c4" "$c4_more" "$chat" "$own_anew" "$short" "$short_sampled" "$short_by_sparse" \
  --distill-samples 900 1200 300 900 1200 1100 1200 --length 256 --seed 3 --dtype bfloat16 --steps 850 \
  --minibatch 8 --batch 8 --learning-rate 0.01 --output "$folder/recovery.safetensors"
