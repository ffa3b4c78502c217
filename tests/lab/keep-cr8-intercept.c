// Keeps KVM's intercept of CR8 writes switched on, so that UEFI firmware can run in the lab.
//
// Without it QEMU's TCG aborts ("tcg_handle_interrupt: assertion failed: (bql_locked())") as soon as a guest of the lab writes CR8 while a
// virtual interrupt waits: its emulation of that write raises an interrupt without holding the lock this needs. Seen with QEMU 7.2 to 11.1.
// KVM sets the intercept when it makes a vCPU and drops it again in svm_update_cr8_intercept(); when that function does nothing, each such
// write stays an exit, which KVM emulates by itself. OVMF and Windows write CR8 that way, Linux does not.
//
// Load after kvm-amd. Of no use, and harmless, on real hardware.

#include <linux/kprobes.h>
#include <linux/module.h>

static noinline void return_at_once(void)
{
	barrier();
}
NOKPROBE_SYMBOL(return_at_once);

/* Runs instead of the probed function's first instruction: its caller gets a plain return. */
static int divert(struct kprobe *probe, struct pt_regs *regs)
{
	instruction_pointer_set(regs, (unsigned long)return_at_once);
	return 1;
}
NOKPROBE_SYMBOL(divert);

static struct kprobe update_cr8_intercept = {
	.symbol_name = "svm_update_cr8_intercept",
	.pre_handler = divert,
};

static int __init load(void)
{
	return register_kprobe(&update_cr8_intercept);
}

static void __exit unload(void)
{
	unregister_kprobe(&update_cr8_intercept);
}

module_init(load);
module_exit(unload);
MODULE_DESCRIPTION("Keeps CR8 writes intercepted by kvm-amd");
MODULE_LICENSE("GPL");
