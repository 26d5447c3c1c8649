"""From registered tasks to batches: vocabulary, token cache, sampling. TensorFlow only where a cache is built."""
