"""Training, evaluation and the run folder; knows tasks only through `mambaverse.engine.task.Task`."""
