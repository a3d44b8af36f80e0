#!/bin/sh
# sh train_zoodip.sh         the paper's run: Stable Diffusion v1.5 and DreamBooth's dog6 (dataset/README.md: how to get it)
# sh train_zoodip.sh demo    the bundled miniature and the bundled subject: a minute or two on two CPU cores
#
# MODEL_NAME, DATA_DIR and OUTPUT_DIR override the paths; arguments are passed on to train_zoodip.py and override the
# ones below. Hyper-parameters are not set here: train_zoodip.py's defaults are the paper's. Only the demo sets two: it has
# 1,000 steps instead of 30,000 (learning rate), and a token of 256 numbers instead of 768 (tau, in proportion).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$(command -v python3 || command -v python)}

if [ "${1:-}" = demo ]; then
    shift
    exec "$python" "$here/train_zoodip.py" \
        --pretrained_model_name_or_path "${MODEL_NAME:-$here/miniature/model}" \
        --train_data_dir "${DATA_DIR:-$here/dataset/furmix}" \
        --output_dir "${OUTPUT_DIR:-$here/results/demo}" \
        --cc_file "$here/cc.json" --use_cc \
        --initializer_token critter \
        --max_train_steps 1000 --learning_rate 1e-2 --tau 43 \
        --validation_prompt "a {} on the beach wearing a red hat" --validation_guidance 5 \
        "$@"
fi

exec "$python" "$here/train_zoodip.py" \
    --pretrained_model_name_or_path "${MODEL_NAME:-stable-diffusion-v1-5/stable-diffusion-v1-5}" \
    --train_data_dir "${DATA_DIR:-$here/dataset/dog6}" \
    --output_dir "${OUTPUT_DIR:-$here/results}" \
    --cc_file "$here/cc.json" --use_cc \
    --initializer_token dog \
    "$@"
