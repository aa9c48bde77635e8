"""Model servers on interruptible machines: health and drain on the machine, the load balancer beside the orchestrator."""
