
# Appended to .venv/bin/activate, so that a plain `flwr run .` does the same job as `pfedgpa run`:
# a Flower home of this checkout, a federation of ten one-CPU clients, and no second installation
# of the dependencies at run time.
export FLWR_HOME="$(dirname "$VIRTUAL_ENV")/.flwr-home"
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_DISABLE_UPDATE_CHECK=1
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
if [ ! -f "$FLWR_HOME/config.toml" ]; then
    mkdir -p "$FLWR_HOME"
    cat > "$FLWR_HOME/config.toml" <<'TOML'
[superlink]
default = "local"

[superlink.local]
address = ":local:"
options.num-supernodes = 10
options.backend.client-resources.num-cpus = 1
TOML
fi
