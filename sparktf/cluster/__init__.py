"""TensorFlow nodes in Spark's barrier tasks.

Words used in this package:

node
    One barrier task and the TensorFlow that runs for it; its rank is the task's partition id.
job
    What all nodes of one run are told, frozen and sent with the task.
control connection
    An authenticated connection from a node to the driver, for progress, the first error and the finished model;
    never for tensors of a step. Nodes do without it where the driver cannot be reached (Spark Connect).
"""
