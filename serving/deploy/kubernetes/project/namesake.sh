#!/bin/sh
# `namesake` as MLflow's Kubernetes backend calls it: each argument is quoted for a shell, and none is there to take the
# quotes off again (mlflow/projects/kubernetes.py, _get_run_command). So they are safe to evaluate, once.
eval "exec namesake $*"
