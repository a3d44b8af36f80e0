#!/bin/sh
# sh train_zoodip.sh         the paper's run: Stable Diffusion v1.5 and DreamBooth's dog6 (dataset/README.md: how to get it), in
#                            4 bits; with --quantization int8 in 8, as in the paper
# sh train_zoodip.sh demo    the bundled miniature and the bundled subject: a minute on two CPU cores
# sh train_zoodip.sh quick   the same in fewer forward passes, by another method (docs/gauss_newton.md)
#
# MODEL_NAME, DATA_DIR and OUTPUT_DIR override the paths. Arguments are passed on to train_zoodip.py (quick:
# trainers/gauss_newton.py) and override the ones below. Hyperparameters are not set here: train_zoodip.py's defaults are
# the paper's, but for those in docs/deviations.md. Only the demo sets four: 500 steps instead of 30,000, a learning rate for
# so few steps (docs/measurements.md), tau scaled to a token of 256 numbers instead of 768, and fp32 on a GPU too, because fp16
# learns less with the paper's mu (docs/measurements.md#precision). quick sets the number of forward passes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # this folder's zoodip/, even if another is installed

bundled() { # run a training script on the bundled miniature and subject: the output folder's name, the script, its arguments
    name=$1 script=$2
    shift 2
    exec "$python" "$here/$script" \
        --pretrained_model_name_or_path "${MODEL_NAME:-$here/miniature/model}" \
        --train_data_dir "${DATA_DIR:-$here/dataset/furmix}" \
        --output_dir "${OUTPUT_DIR:-$here/results/$name}" \
        --cc_file "$here/cc.json" --use_cc \
        --initializer_token critter \
        --validation_prompt "a {} on the beach wearing a red hat" --validation_guidance 5 \
        "$@"
}

case ${1:-} in
demo)
    shift
    bundled demo train_zoodip.py --max_train_steps 500 --learning_rate 4e-2 --tau 43 --mixed_precision fp32 "$@"
    ;;
quick)
    shift
    echo "quick: learns the bundled creature in a few hundred forward passes (Gauss-Newton), then draws it" >&2
    bundled quick trainers/gauss_newton.py --max_forwards 600 "$@"
    ;;
esac

exec "$python" "$here/train_zoodip.py" \
    --pretrained_model_name_or_path "${MODEL_NAME:-stable-diffusion-v1-5/stable-diffusion-v1-5}" \
    --train_data_dir "${DATA_DIR:-$here/dataset/dog6}" \
    --output_dir "${OUTPUT_DIR:-$here/results}" \
    --cc_file "$here/cc.json" --use_cc \
    --initializer_token dog \
    "$@"
