"""Kubernetes: a step is a Job, several nodes are a JobSet.

::

    section.py   what a profile says of a cluster
    names.py     names and labels, by which a job is found again
    render.py    the manifest (pure)
    seen.py      what a Job and its pods say, in our words (pure): the tables
    stuck.py     when a pod that does not begin is given up (pure)
    client.py    the API server, through the official client
    backend.py   the engine made of those
"""
