"""The parts of the closed loop (`launch.closed_loop`): the system that makes feeds, its trainer, what is told of both."""
