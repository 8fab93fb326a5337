"""Ray: a step is a job of Ray's Jobs API, on a cluster that is there.

::

    section.py   what a profile says of a cluster
    render.py    the request (pure), and the line of shell in it
    seen.py      what Ray says of a job, in our words (pure): the tables
    client.py    the Jobs API over HTTP
    backend.py   the engine made of those
"""
