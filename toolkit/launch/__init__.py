"""Steps of a plan as jobs: on this machine, Slurm, Ray or Kubernetes, with one vocabulary.

::

    plan --chain--> specs --backend.render--> text --backend.submit--> the engine's id
                      |                                                   |
                      v                                                   v
            <workspace>/jobs/<chain>/<job>/   <--writes--   python -m toolkit.launch.shim FOLDER
            job.json  submitted.json  attempts/1/           (beats, keeps the log, ends with a cause)

Two tell how a job goes: the engine (queued, running, gone) and the job's own folder (started, beating, ended with a
cause). ``report.py`` makes one state of both, so that what an engine forgets or never knew is known all the same.
"""
