"""What SLURM and torchrun say of how this process was started, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping

COMMAND = (
    'srun --nodes {nodes} --ntasks-per-node 1 bash -c \'torchrun --nnodes {nodes} --node-rank "$SLURM_NODEID" '
    "--master-addr {head} --master-port 29500 --nproc-per-node N launch/STAGE.sh ...'"
)


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse a run on one node of a job that has several: the others would stand by, allotted and idle.

    Args:
        environment: the process's.

    Raises:
        ValueError: with the srun line that starts it on all nodes.
    """
    allotted = int(environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    step = int(environment.get("SLURM_STEP_NUM_NODES", str(allotted)))
    meant = min(allotted, step)  # a job step may be given fewer nodes than the job has
    agents = int(environment.get("GROUP_WORLD_SIZE", "1"))  # of torchrun, one a node
    if agents >= meant:
        return
    head = environment.get("SLURM_LAUNCH_NODE_IPADDR") or environment.get("SLURMD_NODENAME", "FIRST_NODE")
    raise ValueError(
        f"this job has {meant} nodes, but torchrun runs on {agents} of them. Start it on all, with\n    "
        + COMMAND.format(nodes=meant, head=head)
        + "\nor submit launch/slurm/STAGE.sbatch, or take a job of one node"
    )
