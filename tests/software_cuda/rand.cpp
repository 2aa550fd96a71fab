// cuRAND: generators that can be made, for candle makes one with every device. We draw on the host.
namespace {
int generator_value;
}

extern "C" {
int curandCreateGenerator(void** generator, int) { return *generator = &generator_value, 0; }
int curandDestroyGenerator(void*) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return 0; }
int curandSetGeneratorOffset(void*, unsigned long long) { return 0; }
int curandSetStream(void*, void*) { return 0; }
}
