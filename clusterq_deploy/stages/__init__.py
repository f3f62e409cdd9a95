"""The stages of a run, a file each: what it needs, what its result depends on, the work, and that in words.

`clusterq_deploy.pipeline` has their order.
"""
