#!/bin/sh
# What an image holds: both recipes beside this file run it, on Debian with Python 3.11 or later.
# usage: install.sh SOURCE [EXTRA...]    SOURCE is a checkout; extras are those of pyproject.toml.
set -eu
source=$1
shift
extras=$(printf '%s\n' "$@" | paste -sd, -)

# Compilers for what torch, Triton and DeepSpeed compile on first use; libaio for NVMe; ssh and pdsh
# for hostfiles; numactl's library for the binding of ranks.
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends \
    g++ ca-certificates libaio-dev libnuma1 openssh-client pdsh python3-dev python3-venv >/dev/null
rm -rf /var/lib/apt/lists/*

# From the package index alone, in the versions that are tested together; torch brings CUDA's
# libraries along.
python3 -m venv /opt/shardwright
bin=/opt/shardwright/bin
constraints=$source/constraints.txt
"$bin/pip" install --no-cache-dir --quiet --upgrade pip
"$bin/pip" install --no-cache-dir --quiet -c "$constraints" torch
"$bin/pip" install --no-cache-dir --quiet -c "$constraints" "$source${extras:+[$extras]}"
"$bin/shardwright" --version
