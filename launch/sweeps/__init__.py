"""Sweeps: a gin file -> points -> worker processes or a job array -> results -> tables and a report.

In: what `launch.sweep` was asked for. Out: the folder of a sweep (`folder` says what is in it).

    config -> folder -> pool or cluster -> worker (launch.points) -> results -> tables, figures, report
                        view: what is seen meanwhile
"""
