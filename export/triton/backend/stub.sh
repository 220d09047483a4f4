#!/bin/sh
# Starts the stub of Triton's Python backend, which the server waits for. A stub that finds no model.py ends without a
# word: the server waits for ever, takes up no change of any model, and cannot be stopped. So it is given gone.py in its
# place, which fails as any other model.py does: the server says why, and goes on.
# $1 is the model.py; what belongs here is linked beside the folder of backends, see backends.py.
here=$(dirname "$0")/../..
if [ ! -f "$1" ]; then
    export LOWPASS_GONE="$1"
    shift
    set -- "$here/gone/1/model.py" "$@"
fi
exec "$here/stub" "$@"
