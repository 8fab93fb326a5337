"""Jobs on Slurm: a batch script for each, ordered and started again by Slurm itself.

::

    JobSpec --render--> batch script --sbatch--> Slurm --squeue, sacct--> Seen
                             |
                             v
             <job's folder>/slurm.txt  slurm.json     what a node says, and how the script ended
"""

from toolkit.launch.slurm.backend import Slurm

__all__ = ["Slurm"]
