#!/usr/bin/env bash
# Builds the TensorRT engine of an exported run with trtexec, in one of NVIDIA's TensorRT or Triton containers, where
# lowpass and Python need not be installed. An engine is of the GPU and of the TensorRT version that built it: build it
# on the machine, and in the release of the container, that will serve it.
#
#   docker run --rm --gpus 1 -v "$PWD":/work -w /work nvcr.io/nvidia/tensorrt:RELEASE-py3 deploy/build_engine.sh runs/small
#
# RELEASE: one with TensorRT 10.14 or later.
#
# NOT TRIED on a GPU yet, nor in a container: none was at hand. What is tested is which arguments trtexec is given.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: build_engine.sh [--batch MIN:OPT:MAX] [--image SHAPE] [--precision P] [--dense] DIR

Builds DIR/model.P.plan from DIR/model.P.onnx, which `lowpass export DIR --precision P` wrote.

  --batch MIN:OPT:MAX  batch sizes the engine takes, and the one it is tuned for; one number fixes it (default 1:8:32)
  --image SHAPE        of one input (default 3x224x224; of a file exported with --input uint8: 224x224x3)
  --precision P        fp16, bf16 or int8 (default fp16); TensorRT keeps to the precisions of the file
  --dense              dense.P.onnx, the model it came from, in place of model.P.onnx
  --help               this text

DIR/timing.trtexec.cache makes the next build faster. TRTEXEC names the program where it is not on PATH.
Exit codes: 0 built, 1 not built, 2 the arguments cannot be used.
USAGE
}

refuse() {
  echo "build_engine.sh: $1; see --help" >&2
  exit 2
}

fail() {
  echo "build_engine.sh: $1" >&2
  exit 1
}

batch=1:8:32
image=3x224x224
precision=fp16
kind=model
directory=
while (($#)); do
  case $1 in
    --batch | --image | --precision)
      (($# > 1)) || refuse "$1 wants a value"
      case $1 in
        --batch) batch=$2 ;;
        --image) image=$2 ;;
        --precision) precision=$2 ;;
      esac
      shift 2
      ;;
    --dense)
      kind=dense
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) refuse "there is no option $1" ;;
    *)
      [[ -z $directory ]] || refuse "one directory, not $directory and $1"
      directory=$1
      shift
      ;;
  esac
done

[[ -n $directory ]] || refuse "which run directory?"
[[ $precision =~ ^(fp16|bf16|int8)$ ]] || refuse "--precision is fp16, bf16 or int8, not $precision"
[[ $image =~ ^[1-9][0-9]*(x[1-9][0-9]*){2}$ ]] || refuse "--image is a shape such as 3x224x224, not $image"
[[ $batch =~ ^[1-9][0-9]*$ ]] && batch=$batch:$batch:$batch
[[ $batch =~ ^([1-9][0-9]{0,5}):([1-9][0-9]{0,5}):([1-9][0-9]{0,5})$ ]] ||
  refuse "--batch is MIN:OPT:MAX or one number, such as 1:8:32, not $batch"
least=${BASH_REMATCH[1]} best=${BASH_REMATCH[2]} most=${BASH_REMATCH[3]}
((least <= best && best <= most)) || refuse "--batch $batch must ascend: MIN <= OPT <= MAX"
onnx=$directory/$kind.$precision.onnx
plan=$directory/$kind.$precision.plan
[[ -f $onnx ]] || refuse "there is no $onnx; run \`lowpass export $directory --precision $precision\`"

# The containers have it on PATH; the TensorRT of a Debian package does not.
trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
[[ -x $trtexec ]] || fail "there is no trtexec on PATH or at $trtexec; run this in a TensorRT or Triton container"
banner=$("$trtexec" --help 2>&1) || true
[[ $banner =~ TensorRT\ v([0-9]{6}) ]] ||
  fail "$trtexec does not say which TensorRT it is of, or is older than 10; it must be 10.14 or later"
number=$((10#${BASH_REMATCH[1]}))
version=$((number / 10000)).$((number / 100 % 100)).$((number % 100))
echo "TensorRT $version ($trtexec)"
# Its parser reads the Attention of opset 23 from 10.14 on.
((number >= 101400)) || fail "TensorRT $version cannot read $onnx: its Attention needs 10.14 or later"

part=$(mktemp "$directory/.$kind.$precision.plan.XXXXXX.part")
trap 'rm -f "$part"' EXIT
"$trtexec" \
  --onnx="$onnx" \
  --saveEngine="$part" \
  --stronglyTyped \
  --minShapes="images:${least}x$image" \
  --optShapes="images:${best}x$image" \
  --maxShapes="images:${most}x$image" \
  --timingCacheFile="$directory/timing.trtexec.cache" \
  --skipInference ||
  fail "TensorRT $version did not build $onnx; what it said stands above"
[[ -s $part ]] || fail "TensorRT $version wrote no engine of $onnx"
# An older engine's manifest would vouch for this one.
rm -f "$plan.json"
chmod 644 "$part"
mv "$part" "$plan"
echo "$plan: TensorRT $version, batch $least to $most, tuned for $best"
