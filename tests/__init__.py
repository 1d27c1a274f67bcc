import os

# Before gRPC is imported: its handlers of fork() would run in every child that a test starts with a preexec_fn, and can break it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
