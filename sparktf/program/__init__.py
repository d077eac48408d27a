"""Any TensorFlow program as a cluster on Spark's executors: ``sparktf.run``.

Words used in this package, beside those of `sparktf.cluster`:

main
    The user's function; it runs once in every node, in a fresh child process.
task
    The barrier task, parent of the child: it feeds it, forwards what it prints, and ends it.
board
    What the tasks of a run tell each other, several times a second, so that children find each other, servers end when
    the workers are done, and one failure ends all.
compute node
    A node that feeds and trains: chief or worker; not a parameter server, nor the evaluator.
"""
