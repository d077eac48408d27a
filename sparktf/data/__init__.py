"""Arrow columns to tensors: what a node does with its partition before and while Keras trains.

Arrow record batches go through `sparktf.data.arrow` (flattened and checked) into a
`sparktf.data.spool.Spool` (memory-mapped files without a name); `sparktf.data.batches` says which rows
make which step, and `sparktf.data.tfdata` turns both into a ``tf.data.Dataset``. Nothing here knows Spark
or a transport, and TensorFlow is imported only inside `sparktf.data.tfdata`.
"""
