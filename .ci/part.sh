# Prints the name of a part of the checks, runs it, and prints its seconds.
part() {
    local start=$SECONDS
    echo "+ $1"
    "${@:2}"
    echo "  $1: $((SECONDS - start)) s"
}
