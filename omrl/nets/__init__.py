"""Networks: perceptrons, policies, context encoders, attention, the actor-critic."""
