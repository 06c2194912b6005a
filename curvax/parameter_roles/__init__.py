"""What each parameter is (kernel, bias, norm, embedding) and what each of its axes stands for."""
