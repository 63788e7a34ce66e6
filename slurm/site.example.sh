# What this cluster needs, and no other. Copy it to slurm/site.sh (git ignores it), or name a file of
# yours by launcher.site=PATH. Each job gets a copy beside its script and reads it on the first node,
# before its first step; what it exports reaches every rank.

# --- modules --------------------------------------------------------------------------------------
# module purge
# module load cuda/12.8 nccl

# --- network --------------------------------------------------------------------------------------
# The interface between nodes, as `ip -br address` calls it on one of them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# Where host names lead to another network than that, the address of the first node on it:
# export MASTER_ADDR=$(ip -4 -o address show ib0 | awk '{print $4}' | cut -d/ -f1)

# --- environment ----------------------------------------------------------------------------------
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1
# export XDG_CACHE_HOME=$SCRATCH/.cache      # where tokenised data go, unless data.cache_dir is set

# --- container ------------------------------------------------------------------------------------
# Apptainer (container/apptainer.def): a command to run Python in; signals pass through it. Bind what
# the run reads and writes.
# inside=(apptainer exec --nv --bind /shared /shared/images/train.sif)
# python=python3
# Enroot and pyxis: options of srun.
# srun_options=(--container-image=/shared/images/train.sqsh --container-mounts=/shared)
# python=python3
