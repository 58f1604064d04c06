#!/usr/bin/env bash
# A SLURM of two nodes on this machine: `cluster.sh start FOLDER`, `cluster.sh stop FOLDER`. As root; slurm-wlm and munge are installed.
# Both nodes are this host under two names, with daemons, spool folders and ports of their own; no cgroups, no accounting.
set -euo pipefail
action="$1" folder="$2" host="$(hostname)"
export SLURM_CONF="$folder/slurm.conf"

start() {
  mkdir -p "$folder"/{state,log,spool/n1,spool/n2}
  cat > "$SLURM_CONF" << CONF
ClusterName=conan
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
SlurmctldPort=16917
SlurmdPort=16918
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,requeue_setup_env_fail
MpiDefault=none
SwitchType=switch/none
ReturnToService=0
KillWait=10
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17101-17102] CPUs=2 RealMemory=6000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE OverTimeLimit=0 State=UP
CONF
  printf 'CgroupMountpoint=/sys/fs/cgroup\n' > "$folder/cgroup.conf"
  install -d -o munge -g munge -m 0755 /run/munge
  munge -n > /dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged
  slurmctld -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF" -N n1
  slurmd -f "$SLURM_CONF" -N n2
  for _ in $(seq 60); do
    if [[ "$(sinfo -h -o %T)" = idle ]]; then exit 0; fi
    sleep 0.5
  done
  sinfo
  tail -n 20 "$folder"/log/*
  exit 1
}

stop() {
  scancel --user root --full 2> /dev/null || true
  sleep 1
  for file in "$folder"/slurmd-n1.pid "$folder"/slurmd-n2.pid "$folder"/slurmctld.pid; do
    if [[ -s "$file" ]]; then kill "$(cat "$file")" 2> /dev/null || true; fi
  done
}

"$action"
