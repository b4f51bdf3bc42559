"""The ConvLSTM recurrence in Triton: one launch a step."""
