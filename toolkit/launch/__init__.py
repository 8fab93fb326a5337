"""Steps of a plan as jobs: on this machine, Slurm, Ray or Kubernetes, with one vocabulary.

::

    plan --chain--> specs --backend.render--> text --backend.submit--> the engine's id
                      |                                                   |
                      v                                                   v
            <workspace>/jobs/<chain>/<job>/   <--writes--   python -m toolkit.launch.shim FOLDER
            job.json  submitted.json  attempts/1/           (beats, keeps the log, ends with a cause)

Two tell how a job goes: the engine (queued, running, gone) and the job's own folder (started, beating, ended with a
cause). ``report.py`` makes one state of both, so that what an engine forgets or never knew is known all the same.

In the order of a job's life::

    profiles.py  limits.py                     what a profile says, and what it refuses
    spec.py      chain.py    snapshot.py       jobs of a plan, before anything is written
    submit.py    dispatch.py arrays.py         on disk first, then to the engine
    keeper.py    supervise.py  keeper_process.py  who does it for engines that keep no order; how that is started
    shim.py      ending.py   causes.py  retries.py  starts the worker on a node, and says why it ended
    detached.py                                starts keepers and drivers of sweeps so that they outlive us
    in_job.py                                  what the worker does more as a job
    folder.py    report.py   states.py  logs.py  costs.py  what is known of jobs
    actions.py   settle.py                     find, cancel, retry; the end of a chain
    local/       slurm/      ray/       kubernetes/  the engines, behind backend.py; locks.py for this machine
"""
